"""Domains and their text: from sources over split corpora and token files to batches, and verifiable tasks.

`sources` yields documents (`builtin`, `files` and `tasks` know where from), `corpus` and `tokens` are the stages,
`tokenizer` trains and loads tokenizers, `packed` cuts windows and mixes domains into batches.
"""
