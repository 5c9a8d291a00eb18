"""DeepSpeed's engine: what it is told by the stage's parameters, and what by a ZeRO file.

Taught in notebook 03.
"""

from pydantic import ValidationError

from tlv.config import ConfigError, load_json, resolve
from tlv.optimizers import new_optimizer
from tlv.recipes import parameter_groups
from tlv.train_config import TrainConfig

SET_HERE = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
            "gradient_clipping", "bf16", "fp16", "optimizer", "scheduler"}  # not by a ZeRO file


def load_zero(path) -> dict:
    """The `zero_optimization` of a ZeRO settings file. Raises ConfigError."""
    settings = load_json(resolve(path))
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: must be an object with zero_optimization, and in it a stage "
                          "from 0 to 3; see params/deepspeed_zero2.json")
    if taken := sorted(settings.keys() & SET_HERE):
        raise ConfigError(f"{path}: {taken[0]} is set by the stage's own parameters; leave it out")
    return zero


def start_engine(config: TrainConfig, model):
    """Wrap the model: an optimizer over the recipe's groups, ZeRO stage from the JSON file."""
    import deepspeed

    if config.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise ConfigError("precision = 'fp16' needs a GPU; take 'bf16' or 'fp32' here")

    groups = parameter_groups(model, config.learning_rates(), config.weight_decay)
    optimizer = new_optimizer(config.optimizer, model, groups)
    settings = load_json(resolve(config.zero_config)) | {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    try:
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{config.zero_config}: zero_optimization: {wrong}") from error
    if config.precision != "fp32" and engine.zero_optimization_stage() == 0:
        # DeepSpeed has made an empty step here, which leaves Adam's bias correction one step off.
        optimizer.state.clear()
    engine.train()
    return engine
