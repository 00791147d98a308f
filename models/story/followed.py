"""Where the pictures of a batch look for their subject's words, call by call of a run.

Axes: b pictures, n query tokens, m keys, c channels, w words, y x grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..network.blocks import Grid, block_name
from ..network.call import AttnCall
from ..network.traced import Places
from ..subject.maps import SubjectMaps
from ..subject.masks import token_map, token_weights
from ..subject.words import SubjectTokens
from .plan import NODE
from .refusals import require_whole


@dataclass
class FollowedWords:
    """The words' maps so far, and why none can be told at this step, if that is so."""

    pictures: int
    maps: SubjectMaps = field(default_factory=SubjectMaps)
    followed: bool = False  # a cross-attention with the word in it came in this run
    _lost: str = ""  # why the word could not be followed in this step
    _weights: dict[tuple[SubjectTokens, int, int, Places], Tensor | None] = field(
        default_factory=dict
    )

    def begin(self, sigma: float) -> None:
        """The model is about to be asked at this noise level."""
        self._lost = ""
        self.maps.begin(sigma)

    def require_followed(self, sigma: float) -> None:
        """ValueError where another node left no cross-attention in which the word could be
        followed.
        """
        if self._lost and sigma not in self.maps.sigmas:
            raise ValueError(f"{NODE}: {self._lost}")

    def follow(
        self,
        call: AttnCall,
        i: int,
        q: Tensor,
        k: Tensor,
        heads: int,
        grid: Grid,
        sigma: float,
        call_number: int | None,
    ) -> bool:
        """Keep where part i of the call looks for its subject's words; False, and why, where they
        cannot be followed.

        q [b n c], k [b m c] of all parts; grid: what the latent's size makes there;
        call_number: of the model.
        """
        if call.unknown:
            self._lost = f"{call.unknown[:-1]}, or wire masks of the subject."
            return False
        weights = self._weights_of(call, i, k)
        if weights is None:
            self._lost = (
                f"another node's cross-attention patch leaves {k.shape[1]} keys of other contents "
                f"in block {block_name(call.block)} where the text has {call.texts[i].text} "
                f"tokens, so the subject's word cannot be followed there (NegPip, regional "
                f"prompts). Wire masks of the subject, or remove that node."
            )
            return False
        own = call.parts(q)[i]
        require_whole(call, own, self.pictures, grid)
        maps = token_map(own, call.parts(k)[i], weights, heads, call.bias_of(i))  # [b n w]
        maps = maps.movedim(-1, 1).unflatten(2, call.grid)
        self.maps.add(sigma, call.block, id(call.texts[i]), maps, call_number)
        self.followed = True
        return True

    def _weights_of(self, call: AttnCall, i: int, k: Tensor) -> Tensor | None:
        """Weights [b m w] of part i's words among its keys, k [b m c]; None where they are not
        there.
        """
        part, keys = call.texts[i], k.shape[1]
        key = part.subject, part.text, keys, call.places[i] if call.places else ()
        if key not in self._weights:
            words = [
                [call.word(i, row, keys, part.text) for row in word]
                for word in part.subject.of_words(self.pictures)
            ]
            lacks = any(None in rows for rows in words)
            self._weights[key] = (
                None
                if lacks
                else torch.stack([token_weights(rows, keys, k.device) for rows in words], -1)
            )
        return self._weights[key]
