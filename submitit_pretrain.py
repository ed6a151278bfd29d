"""main_pretrain.py as a job of a Slurm cluster, on one node or many; it goes on after each requeue.

What would be submitted, and submits nothing; without --dry_run, it is submitted:

    python submitit_pretrain.py --config recipes/pretrain_vit_large.yaml --data_path IMAGENET --batch_size 64 \\
        --nodes 8 --ngpus 8 --slurm cpus_per_task=12 --dry_run
"""

from util.jobs import submit

if __name__ == "__main__":
    submit.run("main_pretrain")
