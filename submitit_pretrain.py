"""Submits main_pretrain.py as a Slurm job on one or more nodes. The run resumes after each requeue.

This command prints the sbatch script; without --dry_run, it submits the job:

    python submitit_pretrain.py --config recipes/pretrain_vit_large.yaml --data_path IMAGENET --batch_size 64 \\
        --nodes 8 --ngpus 8 --slurm cpus_per_task=12 --dry_run
"""

from mae.jobs import submit

if __name__ == "__main__":
    submit.submit_script("main_pretrain")
