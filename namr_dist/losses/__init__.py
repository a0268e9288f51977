"""Losses of one rank's rows among all ranks': what training minimises.

`registry` is their list, `rows` what each has to offer; a module a loss. Nothing is imported here,
so that the list can be read without torch. Names such as `TripletLoss` are kept free for losses of
(embeddings, labels).
"""
