"""MVBench: letters, twenty tasks, the mean over all questions.

Reads json/{task}.json and video/..., as OpenGVLab/MVBench has them once unpacked. As in published
code the `start` and `end` of a question count for folders of frames alone: clips of the other
tasks are shown whole.
"""

from functools import partial
from pathlib import Path

from tlv.benchmarks.candidates import read_task
from tlv.benchmarks.letters import score_letters
from tlv.benchmarks.question import Question
from tlv.benchmarks.sampling import segment_midpoints, sixteen

MAX_NEW_TOKENS = 1024
TASKS = {  # task: folder below video/
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
BY_SEGMENT = ("nturgbd", "ssv2_video")  # .avi and .webm: midpoints of segments of the whole clip
FRAMES = "tvqa/frames_fps3_hq"  # folders of 00001.jpg ..., three a second


def read(folder: Path, num_frames=sixteen) -> list[Question]:
    questions = []
    for task, place in TASKS.items():
        bounds = ("start", "end") if place == FRAMES else ()
        rule_of = partial(_rule, place, num_frames=num_frames)
        questions += read_task(folder / f"json/{task}.json", f"video/{place}", rule_of, bounds)
    return questions


def _rule(place, row, num_frames):
    """Which frames published code shows; None where it is what the model samples."""
    if place == FRAMES:
        bound, first = (row["start"], row["end"]), 1
    elif place in BY_SEGMENT:
        bound, first = None, 0
    else:
        return None
    return lambda num_total, fps: segment_midpoints(
        num_total, fps, num_frames(num_total, fps), bound, first
    )


score = score_letters
