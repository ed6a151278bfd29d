"""Submits main_segment.py as a Slurm job on one or more nodes. The run resumes after each requeue.

This command prints the sbatch script; without --dry_run, it submits the job:

    python submitit_segment.py --config recipes/segment_ade20k_vit_huge.yaml --data_path ADEChallengeData2016 \\
        --batch_size 2 --finetune mae_pretrain_vit_huge --nodes 1 --ngpus 8 --slurm cpus_per_task=12 --dry_run
"""

from mae.jobs import submit

if __name__ == "__main__":
    submit.submit_script("main_segment")
