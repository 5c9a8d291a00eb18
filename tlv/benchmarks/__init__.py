"""Published benchmarks, one file each: how their files are read, what they ask, how they score.

Each has `read(folder, num_frames)`, which gives `question.Question`s in the published words (of
some, the words or the frames depend on how many frames a model looks at), and
`score(questions, answers)`, by the published rule, so that scores are comparable. One thing is left
out everywhere: the random letter for an answer that names none; such an answer is wrong. Where a
server or a judge scores, a benchmark has `upload`, and `score_judged` for what a judge has said.
`python -m tlv.benchmarks NAME FOLDER --model DIR` asks a model all of one. Taught in notebook 05.
"""
