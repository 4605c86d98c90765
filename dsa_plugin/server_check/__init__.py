"""Does a server with OpenAI's API compute DSA right: asked from outside, judged by contrasts.

`run.py` asks the grid of `grid.py` about texts of `questions.py`; `by_answers.py` and
`by_logprobs.py` say from what came back which faults of `faults.py` the server has.
"""
