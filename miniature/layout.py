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
FLOW_SHIFT = 3.0  # of the noise levels that its sampler takes
FLOW_OFFERED = (
    False  # in Load Checkpoint, among the workflows and in the archive: once it draws well
)
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
FLOW_PREVIEW = [  # the same of the flow miniature's
    [0.2318, 0.1586, 0.3419],
    [0.2772, 0.0781, -0.1139],
    [-0.0751, 0.3294, -0.0607],
    [-0.0720, 0.0444, 0.0614],
    [0.0132, 0.0348, -0.0070],
    [0.0024, -0.0068, -0.1061],
    [0.1015, -0.0129, 0.0573],
    [0.0175, 0.0042, 0.1108],
    [-0.0142, 0.0475, 0.0325],
    [0.0353, 0.0329, 0.0212],
    [0.0106, 0.0374, -0.0251],
    [-0.0214, -0.0256, -0.0056],
    [0.0371, -0.0490, -0.0609],
    [-0.0409, 0.0652, 0.0849],
    [-0.0143, -0.0615, 0.0266],
    [0.0115, 0.0247, 0.0056],
]
FLOW_PREVIEW_BIAS = [-0.0360, 0.0135, -0.0535]
