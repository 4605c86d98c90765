"""A conversation with a served model.

pieces.py  an answer as it comes: reasoning and text
server.py  any server with OpenAI's chat completions
address.py where that is, by URL or by recipe
"""
