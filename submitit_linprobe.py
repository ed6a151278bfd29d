"""Submits main_linprobe.py as a Slurm job on one or more nodes. The run resumes after each requeue.

This command prints the sbatch script; without --dry_run, it submits the job:

    python submitit_linprobe.py --config recipes/linprobe_vit_base.yaml --data_path IMAGENET --batch_size 512 \\
        --finetune mae_pretrain_vit_base --nodes 4 --ngpus 8 --slurm cpus_per_task=12 --dry_run
"""

from mae.jobs import submit

if __name__ == "__main__":
    submit.submit_script("main_linprobe")
