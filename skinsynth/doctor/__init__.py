"""doctor: what would keep a run from working here, found before it is submitted.

``login`` looks at this machine and at the configuration, ``cluster`` at Slurm; ``submit`` sends one job with the resources of ``finetune``
whose every rank runs ``node``. Each check is one line. No torch here, but on the compute node.
"""
