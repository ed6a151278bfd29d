"""main_pretrain.py as a Slurm job, on one or more nodes; the run resumes after each requeue.

Shows the job, and submits it without --dry_run:

    python submitit_pretrain.py --config recipes/pretrain_vit_large.yaml --data_path IMAGENET --batch_size 64 \\
        --nodes 8 --ngpus 8 --slurm cpus_per_task=12 --dry_run
"""

from util.jobs import submit

if __name__ == "__main__":
    submit.run("main_pretrain")
