"""What runs in slices, by class; any other module is run whole, and its parts by their own classes."""

from . import temporal, wan
from .rows import Rows, tokens
from .runner import Forward

SAMPLE = ("hidden_states",)
CONTEXT = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask")

FORWARDS: dict[str, Forward] = {
    # frames stay apart: slices of batch·frames
    "diffusers.models.resnet.ResnetBlock2D": Rows(("input_tensor", "temb")),
    "diffusers.models.transformers.transformer_2d.Transformer2DModel": Rows((*SAMPLE, *CONTEXT)),
    "diffusers.models.downsampling.Downsample2D": Rows(SAMPLE),
    "diffusers.models.upsampling.Upsample2D": Rows(SAMPLE),
    # positions stay apart: slices of height × width
    "diffusers.models.unets.unet_motion_model.AnimateDiffTransformer3D": temporal.motion,
    "diffusers.models.transformers.transformer_temporal.TransformerTemporalModel": temporal.motion,
    "diffusers.models.resnet.SpatioTemporalResBlock": temporal.resnet,
    "diffusers.models.transformers.transformer_temporal.TransformerSpatioTemporalModel": temporal.transformer,
    # tokens stay apart, but for keys and values
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": wan.block,
    "diffusers.models.attention.FeedForward": tokens,
}

# Blocks in which every member of the first list hands its output to the member of the second list in the same place,
# to which the block hands its own arguments besides: both are by frames, so they run as one, slice by slice.
CHAINS: dict[str, tuple[str, str]] = dict.fromkeys(
    (
        "diffusers.models.unets.unet_motion_model.CrossAttnDownBlockMotion",
        "diffusers.models.unets.unet_motion_model.UNetMidBlockCrossAttnMotion",
        "diffusers.models.unets.unet_motion_model.CrossAttnUpBlockMotion",
    ),
    ("resnets", "attentions"),
)
