"""What a run measures of one case of a personalized row."""

from __future__ import annotations


def values(identity, scene=(1.0, 1.0), kind=(1.0, 1.0), seconds=2.0):
    return {
        "identity": identity,
        "scene": list(scene),
        "class": list(kind),
        "whole": [1.0, 0.0],
        "seconds": seconds,
        "unet_calls": 50,
    }
