"""Models as Hugging Face directories, and the parts of a Mixture-of-Experts that the stages work on.

`files` checks what lies in a folder, `checkpoint` loads and saves it, `families` knows which dense architecture
becomes which MoE, `routers` finds routers and experts in a model, `routing` records and replays their choices.
"""
