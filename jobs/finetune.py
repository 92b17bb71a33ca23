"""Fine-tune Stable Diffusion on the cached latents.

    torchrun --nproc-per-node 2 -m jobs.finetune runs/isic   (or srun, one task per GPU)
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("finetune")
