"""Ask a trained model about one clip: `python -m tlv.ask CLIP "question" [--model DIR]`.

Without a model it is the one that `make repro` trains. Prints the answer, then the frames it was
read from. Taught in notebook 04.
"""

import argparse
import sys
from pathlib import Path

import torch

from tlv import ROOT, long_video
from tlv.arguments import to_count, to_device
from tlv.builders import load_model
from tlv.chat import query_of, with_video
from tlv.config import portable
from tlv.pretrained import ModelFolderError
from tlv.templates import render
from tlv.video import Clip, VideoError, is_picture

MODEL = ROOT / "outputs/tiny/04_sft/checkpoint"
NOTHING = "(no answer: the model ended at once)"
PICTURE = "frames looked at: the picture"


@torch.inference_mode()
def answer(model, processor, frames, question: str, max_new_tokens: int = 64) -> str:
    """The greedy answer to one question about frames (T, H, W, 3) uint8; None asks without.

    ValueError where question, clip and answer are more than the LLM's context.
    """
    asked = question if frames is None else with_video(question)
    prompt = render([(asked, None)], model.config.template)
    batch = processor(text=prompt, videos=[frames]).to(model.device)
    num_asked = batch["input_ids"].shape[1]
    context = model.config.text_config.max_position_embeddings
    if num_asked + max_new_tokens > context:
        raise ValueError(f"question and clip are {num_asked} tokens; with {max_new_tokens} of "
                         f"answer that is more than the LLM's context of {context}; ask in fewer "
                         "words")
    ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[0, num_asked:]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def describe_frames(clip: Clip) -> str:
    """Which frames were looked at: numbers in the file and seconds."""
    seen = ", ".join(f"{number} ({second:.2f} s)" for number, second in
                     zip(clip.indices.tolist(), clip.timestamps.tolist(), strict=True))  # fmt: skip
    return (f"frames looked at: {len(clip.indices)} of {clip.num_frames_total} "
            f"({clip.duration:.2f} s at {clip.fps:g} fps)\n{seen}")


def ask(path, question, model_dir, device="cpu", max_new_tokens=64, timeout_s=60.0) -> str:
    """The whole of the command: what it prints. Raises VideoError, ModelFolderError, ValueError."""
    if not question.strip():
        raise ValueError("the question is empty; write it in quotes after the clip")
    if not Path(path).is_file():
        raise VideoError(path, "no such file; check the path of the clip")
    model, processor = load_model(model_dir, what="--model")
    if processor.selector is not None:
        return _ask_long(model.to(device), processor.to(device), path, question, max_new_tokens)
    clip = processor.sample(path, timeout_s)
    said = answer(model.to(device), processor, clip.frames, question, max_new_tokens)
    looked = PICTURE if is_picture(path) else describe_frames(clip)
    return f"{said or NOTHING}\n{looked}"


def _ask_long(model, processor, path, question, max_new_tokens) -> str:
    """The same from a model that chooses keyframes by the question."""
    query = query_of({}, [(question, None)])
    (said,) = long_video.generate(model, processor, path, [(question, query)], max_new_tokens)
    text = processor.tokenizer.decode(said.tokens, skip_special_tokens=True).strip() or NOTHING
    if is_picture(path):
        return f"{text}\n{PICTURE}"
    numbers, seconds = processor.plan(path)
    keyframes = processor.select(path, query)[0]
    seen = ", ".join(f"{numbers[k]} ({seconds[k]:.2f} s)" for k in keyframes.tolist())
    return f"{text}\nkeyframes: {len(keyframes)} of the {len(numbers)} frames looked at\n{seen}"


def main(arguments=None) -> int:
    """Run the command; 2 and one line on stderr if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m tlv.ask", description=__doc__.split("\n")[0])
    parser.add_argument("clip", help="a video or picture file")
    parser.add_argument("question")
    parser.add_argument("--model", default=MODEL, metavar="DIR",
                        help=f"a checkpoint's folder; without one {portable(MODEL)}")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=to_count, default=64, metavar="N")
    parser.add_argument("--device", type=to_device, default="auto", help="auto (a GPU where there "
                        "is one), cpu, cuda ...")  # fmt: skip
    a = parser.parse_args(arguments)
    try:
        print(ask(a.clip, a.question, a.model, a.device, a.max_new_tokens))
    except (VideoError, ModelFolderError, ValueError) as error:
        print(f"tlv.ask: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
