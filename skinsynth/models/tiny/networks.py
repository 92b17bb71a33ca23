"""The four networks' shapes, and the folder they are kept in. A picture is 64 px, its latent (4, 16, 16)."""
import copy
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 64  # pixels


def new_vae() -> AutoencoderKL:
    """0.9 M parameters; convolutions only, since attention at 16x16 cost time and gained nothing that one sees."""
    vae = AutoencoderKL(
        sample_size=SIZE, latent_channels=4, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, mid_block_add_attention=False)
    return vae.to(memory_format=torch.channels_last)  # four times as fast on a CPU


def new_text_encoder(tokenizer: CLIPTokenizer, hidden: int = 128) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, projection_dim=hidden, intermediate_size=4 * hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def new_unet(context: int = 128) -> UNet2DConditionModel:
    """6.7 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=(64, 128, 128), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        cross_attention_dim=context, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def new_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule; DDPM and the others load from the same config."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="epsilon", steps_offset=1, algorithm_type="dpmsolver++")


def pipeline(vae: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer, unet: nn.Module) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def save_half(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """As float16 safetensors; each part appears whole, `model_index.json` last. `pipe` itself stays as it is."""
    half = {name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part for name, part in pipe.components.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part_folder:
        StableDiffusionPipeline(**half, requires_safety_checker=False).save_pretrained(part_folder)
        pipe.tokenizer.backend_tokenizer.model.save(f"{part_folder}/tokenizer")  # vocab.json and merges.txt, CLIP's own form
        for path in Path(part_folder).rglob("*.*"):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        (folder / "model_index.json").unlink(missing_ok=True)
        for part in sorted(Path(part_folder).iterdir(), key=lambda path: path.name == "model_index.json"):
            if part.is_dir():
                shutil.rmtree(folder / part.name, ignore_errors=True)
            part.replace(folder / part.name)
