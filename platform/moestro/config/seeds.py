"""`Seed`: a number that every generator takes which a config seeds.

PyTorch's take less than 2**64, of the negative ones some; NumPy's refuse negative ones. Below 2**63 it also fits
wherever an integer has 64 bits and a sign.
"""

from typing import Annotated

from pydantic import Field

Seed = Annotated[int, Field(ge=0, lt=2**63)]
