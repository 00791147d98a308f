"""A concept encoder in small, and the layers of the real ones."""

from __future__ import annotations

from kindred.models.concept.encoder import ConceptConfig, Preprocessing

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LAYERS = ((("input", 1, 0), 8), (("middle", 0, 0), 16), (("output", 3, 1), 8))
SMALL = ConceptConfig("SD15", LAYERS, 12, 16, TOWER, Preprocessing(16), training={"steps": 3})

# the table of method.md section 1, written out: block, channels, depth
SD15 = tuple(
    ((s, i, 0), c)
    for s, blocks in (
        ("input", {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}),
        ("middle", {0: 1280}),
        ("output", {3: 1280, 4: 1280, 5: 1280, 6: 640, 7: 640, 8: 640, 9: 320, 10: 320, 11: 320}),
    )
    for i, c in blocks.items()
)
SDXL = tuple(
    ((s, i, d), c)
    for s, blocks in (
        ("input", {4: (640, 2), 5: (640, 2), 7: (1280, 10), 8: (1280, 10)}),
        ("middle", {0: (1280, 10)}),
        (
            "output",
            {0: (1280, 10), 1: (1280, 10), 2: (1280, 10), 3: (640, 2), 4: (640, 2), 5: (640, 2)},
        ),
    )
    for i, (c, depth) in blocks.items()
    for d in range(depth)
)
