"""How a student sees pairs beside how its teacher does: numbers that no objective has to have trained.

`cka`, `rows`, `geometry` and `neighbours` are functions of embeddings; `pair` names what they give; `compare` shows a set to both models.
"""
