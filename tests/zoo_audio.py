"""Tiny denoisers of sound, of sound with video, of the Sana video family and of proteins; see zoo.py."""

from typing import Any

import torch
from torch import Tensor
from zoo import Case, Draw

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
WIDTH = 32
TEXT = 24  # width of the text embeddings
FRAMES, HEIGHT, CLIP = 2, 3, 2 * 3 * 3  # frames, rows and columns, tokens of a video
SOUND = 5  # tokens of a sound


def t(value: float = 601.0) -> Tensor:
    """One timestep for both rows, as pipelines give it."""
    return torch.full((2,), value)


def first_frame_clean(value: float = 601.0) -> Tensor:
    """A timestep per token of a video whose first frame is given (image to video)."""
    return torch.cat([torch.zeros(2, CLIP // FRAMES), torch.full((2, CLIP - CLIP // FRAMES), value)], dim=1)


def lengths(*rows: int) -> Tensor:
    """Mask of rows padded to the longest of them."""
    return torch.arange(max(rows)) < torch.tensor(rows)[:, None]


def grid(*sizes: int) -> Tensor:
    """Coordinates of a grid's cells, one row per axis."""
    return torch.stack(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")).flatten(1)


def ace_step(draw: Draw) -> dict[str, Any]:
    # 13 frames in patches of 2: the forward pads, and crops what it pads.
    latents = dict(hidden_states=draw(2, 13, 8), context_latents=draw(2, 13, 16))
    text = dict(encoder_hidden_states=draw(2, 6, TEXT), attention_kwargs=None)
    return dict(latents, **text, timestep=t(0.6), timestep_r=t(0.6), return_dict=False)


def cosmos3(draw: Draw, clean_frames: int = 0, sound: bool = False, action: bool = False) -> dict[str, Any]:
    """One packed sequence without a batch: text, then the video's patches, then sound, then actions."""
    text, frames, shape = 5, 3, (3, 2, 2)  # 3 rows and columns in patches of 2: padded
    per_frame = 4
    noisy = torch.arange(clean_frames, frames)
    start = text
    places = torch.arange(start, start + frames * per_frame)
    vision = dict(
        vision_tokens=[draw(1, 4, frames, 3, 3)],
        vision_token_shapes=[shape],
        vision_sequence_indexes=places,
        vision_mse_loss_indexes=places[clean_frames * per_frame :],
        vision_timesteps=torch.full((len(noisy) * per_frame,), 601.0),
        vision_noisy_frame_indexes=[noisy],
    )
    positions = [torch.arange(text).expand(3, -1), grid(*shape) + torch.tensor([[text + 20], [0], [0]])]
    start += len(places)
    if sound:
        places = torch.arange(start, start + SOUND)
        vision |= dict(
            sound_tokens=[draw(6, SOUND)],
            sound_token_shapes=[(SOUND, 1, 1)],
            sound_sequence_indexes=places,
            sound_mse_loss_indexes=places.clone(),
            sound_timesteps=torch.full((SOUND,), 601.0),
            sound_noisy_frame_indexes=[torch.arange(SOUND)],
        )
        positions.append(grid(SOUND, 1, 1) + torch.tensor([[text + 20], [0], [0]]))
        start += SOUND
    if action:
        places, steps = torch.arange(start, start + 4), torch.arange(1, 4)
        vision |= dict(
            action_tokens=[draw(4, 3)],
            action_token_shapes=[(4, 1, 1)],
            action_sequence_indexes=places,
            action_mse_loss_indexes=places[steps],
            action_timesteps=torch.full((3,), 601.0),
            action_noisy_frame_indexes=[steps],
            action_domain_ids=[torch.tensor(1)],
        )
        positions.append(grid(4, 1, 1) + torch.tensor([[text + 21], [0], [0]]))
        start += 4
    return dict(
        input_ids=draw.ints(30, text),
        text_indexes=torch.arange(text),
        position_ids=torch.cat(positions, dim=1).float(),
        und_len=text,
        sequence_length=start,
        **vision,
        return_dict=False,
    )


COSMOS3 = dict(
    head_dim=16,
    hidden_size=WIDTH,
    intermediate_size=48,
    latent_channel=4,
    patch_latent_dim=16,
    num_attention_heads=2,
    num_hidden_layers=3,
    num_key_value_heads=1,
    rope_axes_dim=(4, 2, 2),
    vocab_size=30,
)
# The text half of the sequence sees only itself and no timestep: its states are the same in every step.
COSMOS3_BLOCKS = dict(chain={"layers": 3}, branches={"layers": ("self_attn", "mlp", "mlp_moe_gen")})


def kandinsky6(draw: Draw, audio: bool = True, image: bool = False) -> dict[str, Any]:
    frames = 3 if image else 2  # the given image is a last frame, at the first one's position
    latents, mask = draw(2, frames, 4, 4, 4), torch.zeros(2, frames, 4, 4, 1)
    mask[:, -1] = float(image)
    return dict(
        hidden_states=torch.cat([latents, torch.zeros_like(latents), mask], dim=-1),
        audio_hidden_states=draw(2, SOUND, 6) if audio else None,
        encoder_hidden_states=draw(2, 5, TEXT),
        pooled_projections=draw(2, 12),
        timestep=t(),
        visual_rope_pos=(torch.tensor([0, 1, 0]), torch.arange(2), torch.arange(2)) if image else None,
        encoder_attention_mask=lengths(5, 3),
        visual_token_type_ids=torch.tensor([[0, 0, 1]] * 2) if image else None,
        return_dict=False,
    )


KANDINSKY6 = dict(
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=TEXT,
    in_text_dim2=12,
    time_dim=16,
    model_dim=WIDTH,
    ff_dim=48,
    num_text_blocks=2,
    num_visual_blocks=3,
    axes_dims=(4, 6, 6),
    in_audio_dim=6,
    out_audio_dim=6,
    model_dim_a=16,
    visual_token_type_num_embeddings=2,
    ca_rope=True,
    cross_gates=True,
    fix_modulation=True,
)
KANDINSKY6_VIDEO = tuple(f"video_dec_block.{name}" for name in ("self_attention", "cross_attention", "feed_forward"))
KANDINSKY6_BOTH = (
    *KANDINSKY6_VIDEO,
    *(name.replace("video", "audio") for name in KANDINSKY6_VIDEO),
    "va_cross_attention",
    "av_cross_attention",
)


def kandinsky6_case(variant: str = "", branches: Any = KANDINSKY6_BOTH, inputs: Any = kandinsky6) -> Case:
    # Two stacks over the text, for video and for audio, run before these blocks in every step.
    stack = "visual_transformer_blocks"
    return Case("Kandinsky6Transformer3DModel", KANDINSKY6, inputs, variant, {stack: 3}, {stack: branches})


CLIP_SIZE = dict(num_frames=FRAMES, height=HEIGHT, width=HEIGHT)


def ltx(draw: Draw, timestep: Tensor | None = None, **place: Any) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, CLIP, 8),
        encoder_hidden_states=draw(2, 5, TEXT),
        timestep=t() if timestep is None else timestep,
        encoder_attention_mask=lengths(5, 3).long(),
        attention_kwargs=None,
        **place or dict(CLIP_SIZE, rope_interpolation_scale=(8 / 25, 32, 32)),
        return_dict=False,
    )


LTX = dict(in_channels=8, out_channels=8, **HEADS, cross_attention_dim=WIDTH, num_layers=3, caption_channels=TEXT)


def ltx_case(variant: str = "", inputs: Any = ltx) -> Case:
    stack = "transformer_blocks"
    branches = {stack: ("attn1", "attn2", "ff")}
    return Case("LTXVideoTransformer3DModel", LTX, inputs, variant, {stack: 3}, branches)


def ltx2(draw: Draw, text: tuple[int, int] = (TEXT, TEXT), **extra: Any) -> dict[str, Any]:
    inputs = dict(
        hidden_states=draw(2, CLIP, 8),
        audio_hidden_states=draw(2, SOUND, 6),
        encoder_hidden_states=draw(2, 5, text[0]),
        audio_encoder_hidden_states=draw(2, 5, text[1]),
        timestep=t(),
        sigma=t(),
        encoder_attention_mask=lengths(5, 3).long(),
        audio_encoder_attention_mask=lengths(5, 3).long(),
        **CLIP_SIZE,
        fps=24.0,
        audio_num_frames=SOUND,
        isolate_modalities=False,
        spatio_temporal_guidance_blocks=None,
        perturbation_mask=None,
        use_cross_timestep=False,
        attention_kwargs=None,
        return_dict=False,
    )
    return inputs | extra


LTX2 = LTX | dict(
    audio_in_channels=6,
    audio_out_channels=6,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
)
LTX23 = LTX2 | dict(
    gated_attn=True,
    cross_attn_mod=True,
    audio_gated_attn=True,
    audio_cross_attn_mod=True,
    rope_type="split",
    use_prompt_embeddings=False,
    perturbed_attn=True,
)
LTX23_TEXT = (WIDTH, 16)  # the text comes projected
LTX2_ALONE = ("attn1", "audio_attn1", "attn2", "audio_attn2", "ff", "audio_ff")
LTX2_BRANCHES = (*LTX2_ALONE[:4], "audio_to_video_attn", "video_to_audio_attn", *LTX2_ALONE[4:])


def ltx2_case(variant: str = "", inputs: Any = ltx2, config: Any = LTX2, branches: Any = LTX2_BRANCHES) -> Case:
    stack = "transformer_blocks"
    return Case("LTX2VideoTransformer3DModel", config, inputs, variant, {stack: 3}, {stack: branches})


def longcat(draw: Draw) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 7, 6),
        encoder_hidden_states=draw(2, 5, TEXT),
        encoder_attention_mask=lengths(5, 3),
        timestep=t(0.6),
        attention_mask=lengths(7, 5),
        latent_cond=draw(2, 7, 6),
        return_dict=False,
    )


LONGCAT = dict(dit_dim=WIDTH, dit_depth=3, dit_heads=2, dit_text_dim=TEXT, latent_dim=6)


def longcat_case(variant: str = "", **extra: Any) -> Case:
    branches = {"blocks": ("self_attn", "cross_attn", "ffn")}
    return Case("LongCatAudioDiTTransformer", LONGCAT | extra, longcat, variant, {"blocks": 3}, branches)


def minimax(draw: Draw) -> dict[str, Any]:
    inputs = dict(hidden_states=draw(2, 6, 7), timestep=t(0.4), encoder_hidden_states=draw(2, 7, TEXT))
    return dict(inputs, return_dict=False)


def proteina(draw: Draw, recycle_depth: int = 0) -> dict[str, Any]:
    """Six tokens, the second row padded from the fifth on, the last real token of each row given as context."""
    tokens = (2, 6)
    mask = lengths(6, 4)
    context = torch.zeros(tokens, dtype=torch.bool)
    context[0, 5] = context[1, 3] = True
    coordinates = draw(*tokens, 37, 3)
    coordinates[:, :3] = torch.nan  # not given
    frames = torch.full((*tokens, 6, 5), -1)
    frames[:, 0, 0] = torch.tensor([0, 0, 1, 2, 3])  # the first token's chirality, by its neighbours
    owner = torch.full((*tokens, 6), -1)
    owner[:, 0, 0] = 0
    atoms = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord", "hotspot")
    conditioning = {f"condition_{name}_1_atom": draw.ints(3, *tokens, 37) for name in atoms}
    conditioning |= {
        "is_in_context_conditioning": context,
        "supports_local_latent": mask,
        "condition_coordinate_1_atom": coordinates,
        "condition_InternalCoordinate_1_atom": coordinates,
        "condition_CoordinateGroup_1_atom": draw.ints(3, *tokens, 37) - 1,
        "_prepared_coord_group_seq": draw.ints(3, *tokens, 37).float() - 1,
        "condition_rasa-binned_1_atom": draw.ints(3, *tokens, 37),
        "condition_ChainCentroid_1_atom": draw(*tokens, 3),
        "condition_secondary-structure_1_residue": draw.ints(4, *tokens),
        "condition_index-group_1_token": draw.ints(2, *tokens),
        "condition_cath-label_1_residue": draw.ints(5, *tokens, 3),
        "condition_sequence-probability-ALA_1_residue": draw(*tokens).sigmoid(),
        "chirality": draw(*tokens, 18),
        "chiral_frame_atoms": frames,
        "chiral_slot_owner": owner,
        "charge": draw.ints(3, *tokens, 37) - 1,
        "element": draw.ints(20, *tokens, 37),
        "na_ss_state": draw.ints(2, *tokens),
        "na_ss_state_mask": draw.ints(2, *tokens),
        "molecule_iid": draw.ints(2, *tokens),
        "molecule_entity_id": draw.ints(2, *tokens),
        "token_bond_path_length": draw.ints(9, *tokens, 6),
        "bond_order": draw.ints(5, *tokens, 6),
    }
    pairs = ("bond_mask", "is_aromatic", "canonical_polymer_ordering", "na_ss_pair", "na_ss_pair_mask")
    conditioning |= {name: draw.ints(2, *tokens, 6) for name in pairs}
    return dict(
        bb_ca=draw(*tokens, 3),
        local_latents=draw(*tokens, 4),
        bb_ca_time=t(0.4),
        local_latents_time=t(0.3),
        padding_mask=mask,
        token_type=draw.ints(7, *tokens),
        atom37_mask=draw.ints(2, *tokens, 37).bool(),
        conditioning=conditioning,
        recycle_depth=recycle_depth,
        attention_kwargs=None,
        return_dict=False,
    )


PROTEINA = dict(
    nlayers=4,
    token_dim=WIDTH,
    nheads=2,
    dim_cond=16,
    pair_repr_dim=16,
    latent_dim=4,
    token_type_emb_dim=8,
    cath_emb_dim=4,
    t_emb_dim=16,
    seq_sep_dim=8,
    tri_mult_c=16,
    recycle_conditioning_dim=4,
)


def proteina_case(variant: str = "", inputs: Any = proteina) -> Case:
    # pair_update_layers run between the layers, on the pairs that the layers take as a second input; the tokens
    # themselves run through the layers alone
    chain = {"transformer_layers": 4}
    branches = {"transformer_layers": ("mhba", "transition")}
    return Case("RFD4ProteinaTransformer", PROTEINA, inputs, variant, chain, branches)


def sana_video(draw: Draw, **extra: Any) -> dict[str, Any]:
    inputs = dict(
        hidden_states=draw(2, 4, FRAMES, 2 * HEIGHT, 2 * HEIGHT),
        encoder_hidden_states=draw(2, 5, TEXT),
        encoder_attention_mask=lengths(5, 3).long(),
        timestep=t(),
        attention_kwargs=None,
        return_dict=False,
    )
    return inputs | extra


SANA_VIDEO = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=TEXT,
)


def sana_video_case(variant: str = "", inputs: Any = sana_video, **extra: Any) -> Case:
    stack = "transformer_blocks"
    branches = {stack: ("attn1", "attn2", "ff")}
    return Case("SanaVideoTransformer3DModel", SANA_VIDEO | extra, inputs, variant, {stack: 3}, branches)


def refiner(draw: Draw, mode: str = "inject") -> dict[str, Any]:
    """One block of frames that also attends to the keys and values of earlier ones."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    def rotary(tokens: int) -> tuple[Tensor, Tensor]:
        angles = draw(2, tokens, WIDTH // 2).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()

    cache = SanaWMRefinerKVCache(LTX2["num_layers"])
    cache.sink_pe = rotary(3)
    for i in range(len(cache)):
        cache.get(i).store_sink(draw(2, 3, WIDTH), draw(2, 3, WIDTH))
        cache.get(i).store_history(draw(2, 4, WIDTH), draw(2, 4, WIDTH))
    return dict(
        hidden_states=draw(2, CLIP, 8),
        encoder_hidden_states=draw(2, 5, TEXT),
        timestep=t()[:, None].expand(2, CLIP),
        video_rotary_emb=rotary(CLIP),
        encoder_attention_mask=lengths(5, 3).long(),
        kv_cache=cache,
        kv_cache_mode=mode,
        return_dict=False,
    )


def refiner_case(variant: str = "", inputs: Any = refiner) -> Case:
    # Each block also has LTX-2's audio modules; none of them runs.
    stack = "transformer_blocks"
    branches = {stack: ("attn1", "attn2", "ff")}
    return Case("SanaWMLTX2RefinerTransformer3DModel", LTX2, inputs, variant, {stack: 3}, branches)


def sana_wm(draw: Draw) -> dict[str, Any]:
    camera = torch.eye(4).repeat(2, FRAMES, 1, 1)
    camera[..., :3, :3] = torch.linalg.qr(draw(2, FRAMES, 3, 3))[0]
    camera[..., :3, 3] = draw(2, FRAMES, 3)
    lens = torch.tensor([3.0, 3.0, 1.5, 1.5]).expand(2, FRAMES, 4)
    timestep = torch.tensor([0.0, 601.0]).expand(2, 1, FRAMES)  # the first frame is given
    return dict(
        hidden_states=draw(2, 4, FRAMES, HEIGHT, HEIGHT),
        timestep=timestep,
        encoder_hidden_states=draw(2, 1, 5, TEXT),
        return_dict=False,
        data_info={"img_hw": torch.tensor([[96.0, 96.0]])},
        mask=lengths(5, 3).long(),
        camera_conditions=torch.cat([camera.flatten(2), lens], dim=-1),
        chunk_plucker=draw(2, 6, FRAMES, HEIGHT, HEIGHT),
    )


SANA_WM = dict(
    in_channels=4,
    num_layers=4,
    hidden_size=WIDTH,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=16,
    chunk_plucker_channels=6,
    caption_channels=TEXT,
)


def sana_wm_case(variant: str = "", **extra: Any) -> Case:
    branches = {"blocks": ("attn", "cross_attn", "mlp")}
    return Case("SanaWMTransformer3DModel", SANA_WM | extra, sana_wm, variant, {"blocks": 4}, branches)


def stable_audio3(draw: Draw, **extra: Any) -> dict[str, Any]:
    inputs = dict(
        hidden_states=draw(2, 8, 7),
        timestep=t(0.6),
        encoder_hidden_states=draw(2, 5, TEXT),
        global_hidden_states=draw(2, TEXT),
        encoder_attention_mask=lengths(5, 3),
        return_dict=False,
    )
    return inputs | extra


STABLE_AUDIO3 = dict(
    io_channels=8,
    embed_dim=WIDTH,
    depth=3,
    num_heads=2,
    cond_token_dim=TEXT,
    global_cond_dim=TEXT,
    local_add_cond_dim=9,
    timestep_features_dim=16,
    num_memory_tokens=3,
)


def stable_audio3_case(variant: str = "", inputs: Any = stable_audio3, **extra: Any) -> Case:
    stack = "transformer_blocks"
    branches = {stack: ("self_attn", "cross_attn", "ff")}
    return Case("StableAudio3DiTModel", STABLE_AUDIO3 | extra, inputs, variant, {stack: 3}, branches)


def stable_audio(draw: Draw) -> dict[str, Any]:
    angles = torch.outer(torch.arange(8.0), 0.1 ** torch.arange(4.0)).repeat(1, 2)
    return dict(
        hidden_states=draw(2, 8, 7),
        timestep=torch.tensor([0.6]),  # one for all rows
        encoder_hidden_states=draw(2, 5, TEXT),
        global_hidden_states=draw(2, 1, 12),  # becomes a token before the sound's
        rotary_embedding=(angles.cos(), angles.sin()),
        return_dict=False,
    )


STABLE_AUDIO = dict(
    sample_size=7,
    in_channels=8,
    num_layers=3,
    **HEADS,
    num_key_value_attention_heads=1,
    out_channels=8,
    cross_attention_dim=16,
    time_proj_dim=16,
    global_states_input_dim=12,
    cross_attention_input_dim=TEXT,
)


def film(draw: Draw) -> dict[str, Any]:
    encodings = [(draw(2, 5, WIDTH), lengths(5, 3)), (draw(2, 4, WIDTH), lengths(4, 4))]
    return dict(encodings_and_masks=encodings, decoder_input_tokens=draw(2, 7, 8), decoder_noise_time=t(0.6))


def temporal(draw: Draw) -> dict[str, Any]:
    # Two videos of three frames.
    return dict(hidden_states=draw(6, 8, 2, 3), num_frames=3, cross_attention_kwargs=None, return_dict=False)


CASES = [
    Case(
        "AceStepTransformer1DModel",
        dict(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            sliding_window=2,
            encoder_hidden_size=TEXT,
        ),
        ace_step,
        chain={"layers": 4},
        branches={"layers": ("self_attn", "cross_attn", "mlp")},
    ),
    Case("Cosmos3OmniTransformer", COSMOS3, cosmos3, **COSMOS3_BLOCKS),
    Case(
        "Cosmos3OmniTransformer",
        COSMOS3
        | dict(sound_gen=True, sound_dim=6, action_gen=True, action_dim=3, num_embodiment_domains=2)
        | dict(hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True),
        lambda draw: cosmos3(draw, clean_frames=1, sound=True, action=True),
        "image-sound-action",
        **COSMOS3_BLOCKS,
    ),
    kandinsky6_case(),
    kandinsky6_case("image", inputs=lambda draw: kandinsky6(draw, image=True)),
    kandinsky6_case("silent", KANDINSKY6_VIDEO, lambda draw: kandinsky6(draw, audio=False)),
    ltx2_case(),
    ltx2_case("2.3", lambda draw: ltx2(draw, LTX23_TEXT, use_cross_timestep=True), LTX23),
    ltx2_case(
        "perturbed",
        lambda draw: ltx2(draw, LTX23_TEXT, use_cross_timestep=True, spatio_temporal_guidance_blocks=[1]),
        LTX23 | dict(use_prompt_adaln_single=False),
    ),
    ltx2_case("isolated", lambda draw: ltx2(draw, isolate_modalities=True), branches=LTX2_ALONE),
    ltx2_case("image", lambda draw: ltx2(draw, timestep=first_frame_clean(), audio_timestep=t())),
    ltx2_case(
        "keyframes",
        lambda draw: ltx2(
            draw,
            timestep=first_frame_clean(),
            audio_timestep=t(400.0),
            audio_sigma=t(400.0),
            use_cross_timestep=True,
            video_keyframes_mask=(first_frame_clean() == 0).float()[..., None],
        ),
        LTX2 | dict(use_keyframes_abs_pos_embedding=True),
    ),
    ltx2_case("reference", lambda draw: ltx2(draw, video_self_attention_mask=draw(2, CLIP, CLIP).sigmoid())),
    ltx_case(),
    ltx_case("image", lambda draw: ltx(draw, first_frame_clean())),
    ltx_case(
        "coords",
        lambda draw: ltx(
            draw, first_frame_clean(), video_coords=grid(FRAMES, HEIGHT, HEIGHT).expand(2, -1, -1).float()
        ),
    ),
    longcat_case(),
    longcat_case("local", adaln_type="local", long_skip=False, cross_attn_norm=True),
    Case(
        "MiniMaxMusic3Transformer1DModel",
        dict(
            in_channels=6,
            condition_dim=TEXT,
            num_layers=3,
            **HEADS,
            ff_inner_dim=48,
            rotary_dim=8,
            fourier_embedding_dim=16,
        ),
        minimax,
        chain={"transformer_blocks": 3},
        branches={"transformer_blocks": ("attn", "ff_out")},
    ),
    proteina_case(),
    proteina_case("recycle", lambda draw: proteina(draw, recycle_depth=3)),
    sana_video_case(),
    sana_video_case(
        "image",
        lambda draw: sana_video(draw, timestep=first_frame_clean().view(2, 1, FRAMES, HEIGHT, HEIGHT)),
    ),
    # The first block gets no residual; with two of them, the second is added after the last block.
    sana_video_case(
        "controlnet",
        lambda draw: sana_video(draw, controlnet_block_samples=(draw(2, CLIP, 24), draw(2, CLIP, 24))),
    ),
    sana_video_case("guidance", lambda draw: sana_video(draw, guidance=t(4.5)), guidance_embeds=True),
    sana_video_case("learned-sigma", out_channels=8),
    refiner_case(),
    refiner_case("capture", lambda draw: refiner(draw, "inject_and_capture_post_rope")),
    sana_wm_case(),
    sana_wm_case("raymap", use_chunk_plucker_post_attn=False),
    stable_audio3_case(),
    stable_audio3_case("inpaint", lambda draw: stable_audio3(draw, local_add_cond=draw(2, 9, 7))),
    Case(
        "StableAudioDiTModel",
        STABLE_AUDIO,
        stable_audio,
        chain={"transformer_blocks": 3},
        branches={"transformer_blocks": ("attn1", "attn2", "ff")},
    ),
    Case(
        "T5FilmDecoder",
        dict(input_dims=8, targets_length=8, d_model=WIDTH, num_layers=3, num_heads=2, d_kv=16, d_ff=48),
        film,
        chain={"decoders": 3},
        branches={"decoders": ("layer.0.attention", "layer.1.attention", "layer.2.DenseReluDense")},
    ),
    # A part of the video UNets, whose pipelines never call it; without a text both attentions look at the frames.
    Case(
        "TransformerTemporalModel",
        dict(**HEADS, in_channels=8, num_layers=3, norm_num_groups=4),
        temporal,
        chain={"transformer_blocks": 3},
        branches={"transformer_blocks": ("attn1", "attn2", "ff")},
    ),
]

UNBUILDABLE: dict[str, str] = {
    "MiniMaxMusic3RVQDepthDecoder": (
        "not a denoiser: a causal language model that predicts a frame's residual codes one after the other; "
        "its forward takes embeddings alone, without a sample or a timestep"
    ),
}
