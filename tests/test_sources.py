"""What fine-tuning can start from: every kind of Stable Diffusion, as a folder or as one file. The models are tiny and random, but of the real
layouts; encode, fine-tuning, export and generation run on them as they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, free_port, overrides
from safetensors.torch import load_file, save_file

from skinsynth import config, knobs
from skinsynth.data.dataset import Dataset
from skinsynth.errors import UserError
from skinsynth.knobs import Model
from skinsynth.models import diffusion, hub
from skinsynth.models.denoiser import Denoiser
from skinsynth.models.painter import Weights
from skinsynth.models.tiny import WEIGHTS
from skinsynth.run import RunDir, Task
from skinsynth.stages.encode import encode
from skinsynth.stages.finetune import finetune
from skinsynth.stages.generate import generate
from skinsynth.stages.prepare import prepare
from skinsynth.train.log import read_lines
from skinsynth.world import World

SIZE = 32  # pixels
KINDS = ("sd15", "sd21", "sdxl")
KEYS: dict[str, object] = {"prepare.size": SIZE, "finetune.steps": 2, "finetune.global_batch": 4, "finetune.lr": 1e-3, "finetune.snr_gamma": "null",
                           "generate.steps": 2, "generate.classes.benign.count": 3, "generate.classes.malignant.count": 3, "generate.batch": 2}


def clip(kind: Any, tokenizer: Any, width: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    return kind(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
                               max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                               pad_token_id=tokenizer.pad_token_id, **more))


def pipeline(kind: str) -> Any:
    """A random Stable Diffusion with the switches that tell its kinds apart, and the built-in model's tokenizer."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(KINDS.index(kind))
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS, subfolder="tokenizer")
    vae = diffusers.AutoencoderKL(sample_size=SIZE, latent_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    width = {"sd15": 24, "sd21": 32, "sdxl": 24 + 16}[kind]
    unet: dict[str, Any] = {"cross_attention_dim": width, "attention_head_dim": 2} if kind == "sd15" else {
        "cross_attention_dim": width, "attention_head_dim": (2, 4), "use_linear_projection": True}
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                             "prediction_type": "v_prediction" if kind == "sd21" else "epsilon"}
    plain = {"vae": vae, "tokenizer": tokenizer}
    if kind == "sdxl":
        unet |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 12,
                 "transformer_layers_per_block": (2, 1)}
    network = diffusers.UNet2DConditionModel(sample_size=SIZE // 2, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                                             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **unet)
    if kind == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **plain, unet=network, scheduler=diffusers.EulerDiscreteScheduler(**noise), tokenizer_2=tokenizer, add_watermarker=False,
            text_encoder=clip(CLIPTextModel, tokenizer, 24), text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 16, projection_dim=12))
    return diffusers.StableDiffusionPipeline(
        **plain, unet=network, scheduler=diffusers.DDIMScheduler(**noise, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder=clip(CLIPTextModel, tokenizer, width, hidden_act="gelu" if kind == "sd21" else "quick_gelu"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind a diffusers folder ``sd15``, one file ``sd15.safetensors``, and ``sd15-configs``: the folder without its weights."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        pipeline(kind).save_pretrained(folder / kind)
        save_file(to_ldm(pipeline(kind)), folder / f"{kind}.safetensors")
        shutil.copytree(folder / kind, folder / f"{kind}-configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


# ---- the names of the original code (LDM), as they stand in the files that other tools share ----

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
OPEN_CLIP = {"encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc",
             "fc2": "c_proj", "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
             "final_layer_norm": "ln_final"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def to_ldm(pipe: Any) -> dict[str, torch.Tensor]:
    """The whole pipeline's weights under the original names; one resnet a block, two levels."""
    found = {f"model.diffusion_model.{unet_name(k)}": v for k, v in pipe.unet.state_dict().items()}
    for key, value in pipe.vae.state_dict().items():
        conv = "mid_block.attentions" in key and "norm" not in key and key.endswith("weight")  # a linear layer was a 1x1 convolution
        found[f"first_stage_model.{vae_name(key)}"] = value[:, :, None, None] if conv else value
    if hasattr(pipe, "text_encoder_2"):
        found |= clip_names("conditioner.embedders.0.", pipe.text_encoder) | open_clip_names("conditioner.embedders.1.", pipe.text_encoder_2)
    elif pipe.unet.config.use_linear_projection:
        found |= open_clip_names("cond_stage_model.", pipe.text_encoder)
    else:
        found |= clip_names("cond_stage_model.", pipe.text_encoder)
    return {key: value.clone().contiguous() for key, value in found.items()}


def bare(encoder: Any) -> dict[str, torch.Tensor]:
    return {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}


def clip_names(prefix: str, encoder: Any) -> dict[str, torch.Tensor]:
    return {f"{prefix}transformer.text_model.{key}": value for key, value in bare(encoder).items()}


def open_clip_names(prefix: str, encoder: Any) -> dict[str, torch.Tensor]:
    """The encoders of 2.x and XL come from OpenCLIP: query, key and value are one matrix there, and the projection is transposed."""
    state, found = bare(encoder), {}
    for key in [key for key in state if "q_proj" in key]:
        together = torch.cat([state.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"])
        found[key.replace("self_attn.q_proj.", "self_attn.in_proj_")] = together
    if "text_projection.weight" in state:
        state["text_projection"] = state.pop("text_projection.weight").T
    renamed = {}
    for key, value in {**state, **found}.items():
        for ours, theirs in OPEN_CLIP.items():
            key = key.replace(ours, theirs)
        renamed[f"{prefix}model.{key}"] = value
    return renamed


def unet_name(key: str) -> str:
    block = re.match(r"(down|up|mid)_blocks?\.(?:(\d)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", key)
    if not block:
        return next(theirs + key.removeprefix(ours) for ours, theirs in ENDS.items() if key.startswith(f"{ours}."))
    side, level, what, number, rest = block[1], int(block[2] or 0), block[3], int(block[4]), block[5]
    if what == "resnets":
        rest = next(theirs + rest.removeprefix(ours) for ours, theirs in RESNET.items() if rest.startswith(f"{ours}."))
    if side == "mid":
        return f"middle_block.{2 * number if what == 'resnets' else 1}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{2 + 2 * level}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        return f"output_blocks.{1 + 2 * level}.{1 if level == 0 else 2}.{rest}"  # the first up block has no attention before it
    place = f"input_blocks.{1 + 2 * level + number}" if side == "down" else f"output_blocks.{2 * level + number}"
    return f"{place}.{0 if what == 'resnets' else 1}.{rest}"


def vae_name(key: str) -> str:
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0)", lambda m: f"mid.attn_1.{ATTENTION[m[1]]}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", key)
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
            for key, value in part.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 100
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_gives_the_weights_of_the_folder_it_was_made_from(kind: str, bases: Path) -> None:
    model = Model(base=str(bases / f"{kind}.safetensors"), config=str(bases / f"{kind}-configs"))
    pipe = diffusion.load_base(model)
    assert type(pipe) is type(diffusion.load_pipeline(bases / kind))
    assert_same(pipe, diffusion.load_pipeline(bases / kind))
    assert next(diffusion.load_base(model, "bf16").unet.parameters()).dtype == torch.bfloat16
    vae = load_file(bases / kind / "vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, vae[key]) for key, value in diffusion.load_vae(model).state_dict().items())
    sizes = hub.find_base(model).parameters()
    assert sizes == hub.find_base(Model(base=str(bases / kind))).parameters()
    assert sizes["unet"] == sum(p.numel() for p in pipe.unet.parameters())


@pytest.fixture(scope="module")
def prepared(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    cfg = config.load("configs/demo.yaml", overrides(drawn, folder, **KEYS))
    prepare(cfg, RunDir(Path(cfg.run)), Task(0, 1))
    return folder


def begin(prepared: Path, drawn: Path, folder: Path, **more: object) -> tuple[knobs.Config, RunDir]:
    shutil.copytree(prepared / "shards", folder / "shards", copy_function=os.link)  # makes the folder, too
    cfg = config.load("configs/demo.yaml", overrides(drawn, folder, **{**KEYS, **more}))
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    return cfg, run


@pytest.mark.parametrize("kind", [*KINDS, "file"])
def test_every_kind_is_encoded_tuned_exported_and_drawn_with(kind: str, bases: Path, prepared: Path, drawn: Path, tmp_path: Path) -> None:
    import diffusers

    more = {"model.base": bases / kind} if kind != "file" else {"model.base": bases / "sd15.safetensors", "model.config": bases / "sd15-configs"}
    cfg, run = begin(prepared, drawn, tmp_path, **more)
    encode(cfg, run, Task(0, 1))
    told = load_file(run.node("encode") / "prompts.safetensors")
    assert told.keys() == ({"text", "pooled", "time_ids"} if kind == "sdxl" else {"text"})
    finetune(cfg, run, World())
    losses = first_losses(run)
    assert len(losses) == 2
    assert all(0.1 < loss < 5 for loss in losses)  # a random network against unit noise
    name = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    tuned, base = getattr(diffusers, name).from_pretrained(run.weights), diffusion.load_base(cfg.model)
    assert type(diffusers.DiffusionPipeline.from_pretrained(run.weights)).__name__ == name
    changed = {key.split(".")[0] for key, value in weights(tuned).items() if not torch.equal(value, weights(base)[key])}
    assert changed == {"unet"}
    assert type(tuned.scheduler) is type(base.scheduler)
    assert tuned.scheduler.config.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")
    assert tuned("a dermoscopy image", num_inference_steps=2, height=SIZE, width=SIZE).images[0].size == (SIZE, SIZE)
    generate(cfg, run, Task(0, 1))
    assert len(Dataset.open(run.dataset(cfg, "synthetic"))) == 6


def first_losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in read_lines(run.node("finetune") / "metrics.jsonl")]


@pytest.mark.parametrize("rank", [0, 4])
def test_both_text_encoders_of_sdxl_train(rank: int, bases: Path, prepared: Path, drawn: Path, tmp_path: Path) -> None:
    """Whole or by LoRA. Before the first update they tell the UNet what encode has cached, zeros for the empty prompt included."""
    import diffusers

    losses = {}
    for both in (False, True):
        more = {"finetune.train_text_encoder": both, "finetune.lora_rank": rank, "finetune.caption_dropout": 0.5, "finetune.lr": 1e-2,
                "finetune.warmup_steps": 0}
        cfg, run = begin(prepared, drawn, tmp_path / str(both), **{"model.base": bases / "sdxl", **more})
        encode(cfg, run, Task(0, 1))
        finetune(cfg, run, World())
        losses[both] = first_losses(run)
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-5)
    tuned, base = diffusers.StableDiffusionXLPipeline.from_pretrained(run.weights), diffusion.load_base(cfg.model)
    changed = {key.split(".")[0] for key, value in weights(tuned).items() if not torch.equal(value, weights(base)[key])}
    assert changed == {"unet", "text_encoder", "text_encoder_2"}
    if rank:
        base.load_lora_weights(run.weights / "lora")
        base.fuse_lora()
        base.unload_lora_weights()
        assert all(torch.allclose(value, weights(base)[key], atol=1e-6) for key, value in weights(tuned).items())


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero", [0, 2])
def test_both_text_encoders_of_sdxl_train_on_two_ranks(zero: int, bases: Path, prepared: Path, drawn: Path, tmp_path: Path) -> None:
    """Data parallelism waits for every gradient; the losses are those of one rank."""
    losses = []
    for ranks in (1, 2):
        more = {"model.base": bases / "sdxl", "finetune.zero": zero, "finetune.train_text_encoder": True, "finetune.steps": 4}
        cfg, run = begin(prepared, drawn, tmp_path / str(ranks), **more)
        encode(cfg, run, Task(0, 1))
        tune(run, ranks)
        losses.append(first_losses(run))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 4


def tune(run: RunDir, ranks: int) -> None:
    """As torchrun would start it."""
    env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    gang = [subprocess.Popen([sys.executable, "-m", "jobs.finetune", str(run.path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    said = [process.communicate(timeout=180)[0] for process in gang]
    assert [process.returncode for process in gang] == [0] * ranks, said[0][-3000:]


@pytest.mark.soak  # make test has bf16 in tests/train/test_matrix.py; here it is SDXL
@pytest.mark.timeout(600)
def test_two_ranks_in_bf16_as_on_gpus(bases: Path, prepared: Path, drawn: Path, tmp_path: Path) -> None:
    """What the large models need: ZeRO 2, weights in bf16 (DeepSpeed casts no input), gradient checkpointing; the loss is that of float32."""
    losses = {}
    for precision, ranks in (("bf16", 2), ("fp32", 1)):
        more = {"model.base": bases / "sdxl", "finetune.precision": precision, "finetune.gradient_checkpointing": True, "finetune.zero": 2}
        cfg, run = begin(prepared, drawn, tmp_path / precision, **more)
        encode(cfg, run, Task(0, 1))
        tune(run, ranks)
        losses[precision] = first_losses(run)
        saved = load_file(run.weights / "unet/diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_what_the_pipeline_itself_does(kind: str, bases: Path) -> None:
    """With the prompts encoded apart, as the cache has them; SDXL without a negative prompt means zeros, not the encoded empty text."""
    pipe = diffusion.load_pipeline(bases / kind)
    shape = diffusion.latent_shape(pipe, SIZE)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    prompts = ["a dermoscopy image of a nevus", "a melanoma"]
    told, empty = diffusion.encode_prompts(pipe, prompts, SIZE), diffusion.encode_prompts(pipe, [""], SIZE)
    ours = diffusion.sample(pipe, told, empty, noise.numpy(), 3, 4.0)
    theirs = pipe(prompts, latents=noise, num_inference_steps=3, guidance_scale=4.0, height=SIZE, width=SIZE, output_type="np").images
    assert abs(ours / 255 - theirs).max() < 1.01 / 255
    assert ours[0].std() > 1
    other = diffusion.sample(pipe, {name: values.flip(0) for name, values in told.items()}, empty, noise.numpy(), 3, 4.0)
    assert (ours != other).any()  # the words do matter


# ---- a LoRA of somebody else's ----

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_Q = "encoder.layers.0.self_attn.q_proj"


def lora(pipe: Any, form: str, layers: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Of rank 2, for the layers of each part of a pipeline, in the names of diffusers or kohya: of text encoders in those that transformers had."""
    found, numbers = {}, torch.Generator().manual_seed(0)
    for part, names in layers.items():
        for name in names:
            weight = pipe.components[part].get_submodule(name).weight
            down = torch.randn(2, *weight.shape[1:], generator=numbers)
            up = torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=numbers)
            name = f"text_model.{name}" if part == "text_encoder" else name
            if form == "kohya":
                prefix = f"lora_{'te' if part == 'text_encoder' else part}_{name.replace('.', '_')}"
                found |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": torch.tensor(2.0)}
            else:
                found |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    return found


def layers_of(pipe: Any) -> dict[str, list[str]]:
    """As many tools take them: attention, the projections around it, and convolutions."""
    wanted = re.compile(r"attn\d\.to_[qkv]$|to_out\.0$|proj_in$|proj_out$|resnets\.\d\.conv\d$|[qkv]_proj$|out_proj$|fc\d$")
    return {part: [name for name, _ in pipe.components[part].named_modules() if wanted.search(name)] for part in ("unet", "text_encoder")}


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_a_lora_goes_whole_into_its_base(form: str, kind: str, bases: Path, tmp_path: Path) -> None:
    plain = diffusion.load_pipeline(bases / kind)
    layers = layers_of(plain)
    state = lora(plain, form, layers)
    save_file(state, tmp_path / "lora.safetensors")
    merged = diffusion.load_base(Model(base=str(bases / kind), lora=str(tmp_path / "lora.safetensors"), lora_scale=0.5))
    changed = {key for key, value in weights(merged).items() if not torch.equal(value, weights(plain)[key])}
    assert changed == {f"{part}.{name}.weight" for part, names in layers.items() for name in names}
    assert len(changed) > 30
    if form == "diffusers":
        key = f"unet.{TO_Q}"
        added = 0.5 * state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
        assert torch.allclose(weights(merged)[f"{key}.weight"], weights(plain)[f"{key}.weight"] + added, atol=1e-5)


def renamed(state: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize("case", ["of FLUX", "in peft's names", "of a second text encoder", "of which half has no place", "with one layer too many",
                                  "of a longer text encoder"])
def test_a_lora_that_diffusers_would_pass_over_is_refused(case: str, bases: Path, tmp_path: Path) -> None:
    """In silence, or with a warning among many: the base would pass for one that has it."""
    pipe = diffusion.load_pipeline(bases / "sd15")
    one, two = (lora(pipe, "diffusers", {part: [name]}) for part, name in (("unet", TO_Q), ("text_encoder", TEXT_Q)))
    other = TO_Q.replace("down_blocks.0.attentions.0", "up_blocks.1.attentions.1")
    more = lora(pipe, "diffusers", {"unet": [TO_Q, other, f"{other[:-4]}to_k"]})
    nowhere = renamed(lora(pipe, "diffusers", {"unet": [other]}), "up_blocks.1", "up_blocks.7")
    state, taken = {
        "of FLUX": (renamed(one, f"unet.{TO_Q}", "transformer.single_transformer_blocks.0.attn.to_q"), "0 of its 1"),
        "in peft's names": (renamed(one, "unet.", "base_model.model."), "0 of its 1"),
        "of a second text encoder": (renamed(two, "text_encoder.", "text_encoder_2."), "0 of its 1"),
        "of which half has no place": ({**one, **nowhere}, "1 of its 2"),
        "with one layer too many": ({**more, **nowhere}, "3 of its 4"),
        "of a longer text encoder": (renamed(two, TEXT_Q, TEXT_Q.replace("layers.0", "layers.9")), None),
    }[case]
    path = tmp_path / "lora.safetensors"
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        diffusion.load_base(Model(base=str(bases / "sd15"), lora=str(path)))
    assert f"LoRA {path} " in str(caught.value)
    told = f"{taken} layers have a place there" if taken else "it has layers that the base has not"
    assert f"does not fit the base model: {told}" in str(caught.value)


# ---- the loss ----

@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_error_of_what_the_model_predicts(kind: str, bases: Path) -> None:
    """Written out anew: x_t, epsilon or v (Salimans and Ho 2022), and SDXL's sizes as its own pipeline makes them."""
    from diffusers import DDPMScheduler

    pipe = diffusion.load_pipeline(bases / kind)
    told = diffusion.encode_prompts(pipe, ["a melanoma", ""], SIZE)
    latents, noise = torch.randn(2, 2, *diffusion.latent_shape(pipe, SIZE), generator=torch.Generator().manual_seed(1))
    timestep, weight = torch.tensor([20, 700]), torch.tensor([1.0, 3.0])
    a = pipe.scheduler.alphas_cumprod[timestep][:, None, None, None]
    more = {}
    if kind == "sdxl":
        sizes = pipe._get_add_time_ids((SIZE, SIZE), (0, 0), (SIZE, SIZE), torch.float32, pipe.text_encoder_2.config.projection_dim)
        more = {"added_cond_kwargs": {"text_embeds": told["pooled"], "time_ids": sizes.repeat(2, 1)}}
        assert torch.equal(told["text"][1], torch.zeros_like(told["text"][1]))
    target = a.sqrt() * noise - (1 - a).sqrt() * latents if kind == "sd21" else noise
    with torch.no_grad():
        predicted = pipe.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, timestep, told["text"], **more).sample
        batch = {"latents": latents, "noise": noise, "timestep": timestep, "weight": weight, **told}
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        plain, capped = (diffusion.diffusion_loss(Denoiser(pipe.unet), schedule, batch, gamma).item() for gamma in (None, 5.0))
    errors = (predicted - target).square().mean(dim=(1, 2, 3))
    assert plain == pytest.approx((errors * weight).mean().item(), rel=1e-4)
    snr = (a / (1 - a)).flatten()
    by_snr = snr.clamp(max=5) / (snr + 1 if kind == "sd21" else snr)
    assert capped == pytest.approx((errors * weight * by_snr).mean().item(), rel=1e-4)
    assert abs(capped - plain) > 0.01


# ---- what cannot be used ----

def said(base: Path | str, config: Path | str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        diffusion.load_base(Model(base=str(base), config=config and str(config)))
    return str(caught.value)


def test_one_file_needs_a_configuration_of_its_kind(bases: Path, tmp_path: Path) -> None:
    file = bases / "sd15.safetensors"
    assert "give model.config" in said(file)
    assert "stable-diffusion-v1-5" in said(file)
    assert "skinsynth pull CONFIG model.config=" in said(file)
    assert "takes text of width 24" in said(file, bases / "sd21")
    assert "holds no text_encoder_2" in said(file, bases / "sdxl")
    assert "model.config=nobody/nothing" in said(file, "nobody/nothing")
    assert "skinsynth pull" in said(file, "nobody/nothing")
    assert "missing model_index.json" in said(file, tmp_path)
    for name, usual in (("cond_stage_model.model.ln_final.bias", "stable-diffusion-2-1-base, if the model predicts the noise and not v"),
                        ("conditioner.embedders.1.x", "stable-diffusion-xl-base")):
        save_file({name: torch.zeros(1)}, tmp_path / "other.safetensors")
        assert usual in said(tmp_path / "other.safetensors")


def test_a_file_that_is_no_whole_model_is_named(bases: Path, tmp_path: Path) -> None:
    lora, cut, text, pickled = (tmp_path / name for name in ("lora.safetensors", "cut.safetensors", "text.safetensors", "model.ckpt"))
    save_file({"lora_unet_down.weight": torch.zeros(1)}, lora)
    cut.write_bytes((bases / "sd15.safetensors").read_bytes()[:-10])
    text.write_text("<html>401 Unauthorized</html>")
    pickled.write_bytes(b"x")
    assert "holds no unet, vae, text_encoder" in said(lora, bases / "sd15-configs")
    assert "is cut short" in said(cut, bases / "sd15-configs")
    assert "not a safetensors file" in said(text, bases / "sd15-configs")
    assert "may run any code" in said(pickled, bases / "sd15-configs")
    assert "no such file" in said(tmp_path / "none.safetensors", bases / "sd15-configs")


@pytest.mark.parametrize("config", ["sd15", "sd15-configs"])  # with weights of its own, which diffusers would take, and without
def test_a_file_in_novelais_layout_is_refused(config: str, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {key.replace("transformer.text_model.", "transformer."): value for key, value in load_file(bases / "sd15.safetensors").items()}
    save_file(state, tmp_path / "nai.safetensors")
    assert "holds a text_encoder under names that are not known" in said(tmp_path / "nai.safetensors", bases / config)
    if config == "sd15-configs":
        monkeypatch.setattr(hub, "_check_fit", lambda *_: None)
        assert "cannot be loaded: Failed to load CLIPTextModel" in said(tmp_path / "nai.safetensors", bases / config)


def test_a_file_that_says_it_predicts_v_needs_a_configuration_that_does(bases: Path, tmp_path: Path) -> None:
    save_file({**load_file(bases / "sdxl.safetensors"), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    told = said(tmp_path / "v.safetensors", bases / "sdxl-configs")
    assert "predicts v (it has the key v_pred)" in told
    assert '"rescale_betas_zero_snr": true' in told
    shutil.copytree(bases / "sdxl-configs", tmp_path / "configs")
    schedule = tmp_path / "configs/scheduler/scheduler_config.json"
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), "prediction_type": "v_prediction"}))
    pipe = diffusion.load_base(Model(base=str(tmp_path / "v.safetensors"), config=str(tmp_path / "configs")))
    assert pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("halved", [("vae",), ("unet",), ("unet", "vae"), ("text_encoder",)])
def test_a_folder_whose_parts_differ_in_precision_is_loaded(halved: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "mixed")
    for part in halved:
        for path in (tmp_path / "mixed" / part).glob("*.safetensors"):
            save_file({key: value.half() for key, value in load_file(path).items()}, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
            path.unlink()
    model = Model(base=str(tmp_path / "mixed"))
    pipe, plain = diffusion.load_base(model), diffusion.load_pipeline(WEIGHTS)
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = (next(getattr(which, part).parameters()) for which in (pipe, plain))
        assert torch.equal(mine, theirs.half().float() if part in halved else theirs)
    assert all(torch.equal(value, pipe.vae.state_dict()[key]) for key, value in diffusion.load_vae(model).state_dict().items())


@pytest.mark.parametrize("weight", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_out.bias",
                                    "cond_stage_model.transformer.text_model.final_layer_norm.weight"])
def test_a_file_that_lacks_one_weight(weight: str, bases: Path, tmp_path: Path) -> None:
    state = load_file(bases / "sd15.safetensors")
    del state[weight]
    save_file(state, tmp_path / "lacking.safetensors")
    assert "lacks weights that its configuration asks for" in said(tmp_path / "lacking.safetensors", bases / "sd15-configs")


def test_a_folder_of_another_kind_or_without_its_second_encoder(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "sdxl", tmp_path / "base")
    shutil.rmtree(tmp_path / "base/text_encoder_2")
    assert "missing text_encoder_2/config.json" in said(tmp_path / "base")
    (tmp_path / "base/model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "is a FluxPipeline: known are StableDiffusionPipeline, StableDiffusionXLPipeline" in said(tmp_path / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_says_nothing_of_the_place_it_was_loaded_from(kind: str, bases: Path, tmp_path: Path) -> None:
    for place in ("one", "another"):
        shutil.copytree(bases / kind, tmp_path / place)
        diffusion.load_pipeline(tmp_path / place).save_pretrained(tmp_path / f"saved-{place}")
    assert diffusion.weights_sha256(tmp_path / "saved-one") == diffusion.weights_sha256(tmp_path / "saved-another")
    assert [path for path in (tmp_path / "saved-one").rglob("*.json") if str(tmp_path) in path.read_text()] == []


def test_the_hash_of_a_file_covers_what_it_is_loaded_with(bases: Path, tmp_path: Path) -> None:
    folder, file = bases / "sd15", bases / "sd15.safetensors"
    assert diffusion.base_sha256(Model(base=str(folder))) == diffusion.weights_sha256(folder)
    shutil.copytree(bases / "sd15-configs", tmp_path / "configs")
    model = Model(base=str(file), config=str(tmp_path / "configs"))
    before = diffusion.base_sha256(model)
    assert before == diffusion.base_sha256(Model(base=str(file), config=str(bases / "sd15")))  # weights beside the configurations do not matter
    schedule = tmp_path / "configs/scheduler/scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("epsilon", "v_prediction"))
    assert diffusion.base_sha256(model) != before
    assert diffusion.load_base(model).scheduler.config.prediction_type == "v_prediction"


def test_what_others_put_beside_the_files_that_are_read_changes_no_hash(drawn: Path, tmp_path: Path) -> None:
    """A cache of the hub is often shared: another tool may fetch more of the same model at any time, also while images are drawn with it."""
    base = tmp_path / "base"
    shutil.copytree(WEIGHTS, base)
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"generate.weights": "base", "model.base": base}))
    before, used = diffusion.base_sha256(cfg.model), Weights(cfg, RunDir(tmp_path / "run"))
    assert before == used.sha256 == diffusion.base_sha256(Model(base=str(WEIGHTS)))
    (base / "safety_checker").mkdir()
    (base / "safety_checker/config.json").write_text("{}")
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(weights).items()}, weights.with_suffix(".fp16.safetensors"), {"format": "pt"})
    assert hub.variant(base) is None
    assert diffusion.base_sha256(cfg.model) == before
    used.check()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert diffusion.base_sha256(cfg.model) != before
    with pytest.raises(UserError, match=f"the weights changed while they were used: {before} at the start"):
        used.check()
