"""The miniature's sizes in the host's words: what its loader reads back from the weights, and what the training builds."""

from __future__ import annotations

LATENT_CHANNELS = 8
FLOW_CHANNELS = 16  # of the latents of the flow miniature
FLOW_LAYOUT = {  # of the host's Flux: two double and eight single blocks on 16 x 16 tokens beside 77 of text
    "in_channels": FLOW_CHANNELS,
    "out_channels": FLOW_CHANNELS,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 192,
    "mlp_ratio": 4.0,
    "num_heads": 6,
    "depth": 2,
    "depth_single_blocks": 8,
    "axes_dim": [8, 12, 12],
    "theta": 10_000,
    "patch_size": 1,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
FLOW = "flow-"  # before the names of its files in a work folder
CONTEXT = 64  # width of the text encoder
WORDS = 77
LAYOUT = {  # what the host's model_detection reads back from the weights, in its own words
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
TEXT = {  # both for transformers' CLIPTextConfig and for the host's textmodel_json_config
    "hidden_size": CONTEXT,
    "intermediate_size": 4 * CONTEXT,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": WORDS,
    "projection_dim": CONTEXT,
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
PREVIEW = [  # of each latent channel, for the host's live previews: `python -m miniature.preview`
    [0.3260, 0.2917, 0.3742],  # red, green, blue in -1..1
    [0.2757, 0.0308, -0.2547],
    [-0.1201, 0.2794, -0.0946],
    [0.0158, -0.0255, 0.0322],
    [-0.0047, -0.0088, -0.0218],
    [-0.0197, -0.0179, 0.0245],
    [-0.0004, 0.0015, 0.0122],
    [-0.0147, -0.0122, -0.0120],
]
PREVIEW_BIAS = [0.0090, 0.0647, 0.0028]
