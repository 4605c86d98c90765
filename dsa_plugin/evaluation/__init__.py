"""How well a checkpoint recalls what a long text says, with each way of choosing tokens.

`exams` poses the questions, `run` has a model answer them, `results` keeps the answers and
`gates` judges them. A model is transformers' (`transformers_model`, whose selection `selection`
changes), a server that `hosts` starts, or any that speaks OpenAI's completions (`completions`).
"""
