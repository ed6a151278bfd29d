"""main_finetune.py as a job of a Slurm cluster, on one node or many; it goes on after each requeue.

What would be submitted, and submits nothing; without --dry_run, it is submitted:

    python submitit_finetune.py --config recipes/finetune_vit_base.yaml --data_path IMAGENET --batch_size 32 \\
        --finetune mae_pretrain_vit_base --nodes 4 --ngpus 8 --slurm cpus_per_task=12 --dry_run
"""

from util.jobs import submit

if __name__ == "__main__":
    submit.run("main_finetune")
