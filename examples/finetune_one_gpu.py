"""Fine-tune every parameter of a model that does not fit: one GPU, host memory, one SSD.

    python examples/finetune_one_gpu.py MODEL data.jsonl OUT SSD_DIR [--steps 100]

MODEL is a folder with safetensors or a hub name. A line of data.jsonl has "prompt" and "completion". The script reads as the
work goes: samples, plan, session, steps, result.
"""

import argparse

from transformers import AutoTokenizer

import overspill
from overspill.huggingface.data import build_micro_batches, iterate_steps, read_samples, split_held_out

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("out")
parser.add_argument("ssd_dir")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--dtype", default="bfloat16", help="float32 on a CPU")
options = parser.parse_args()

# Samples: token ids and labels; the loss is on completions only. A few are held out.
tokenizer = AutoTokenizer.from_pretrained(options.model)
pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
samples = read_samples(options.data, tokenizer, seq_len=1024, truncate=True)
training, held_out = split_held_out(samples, 0.05, seed=0)
evaluation = list(build_micro_batches(held_out, micro_batch=4, pad_token_id=pad, seed=None))

# What shall rest where. What is left "auto" goes as high as the machine's free memory allows; optimizer states go to the SSD.
request = overspill.PlanRequest(
    states="ssd",
    ssd_dir=options.ssd_dir,
    dtype=options.dtype,
    seq_len=max(len(sample.input_ids) for sample in samples),
    micro_batch=4,
    accumulate=4,
    clip=1.0,
)
rate = overspill.LearningRate(kind="cosine", base=1e-5, warmup_steps=options.steps // 10, total_steps=options.steps)

# Opening the session plans, refuses with the missing bytes if it does not fit, and loads the weights tensor by tensor.
with overspill.Session(options.model, plan=request, optimizer=overspill.AdamW(lr=1e-5), learning_rate=rate) as session:
    for note in session.plan.notes:
        print(note)
    print(f"held-out loss before: {session.evaluate(evaluation).loss:.4f}")
    steps = iterate_steps(training, micro_batch=4, accumulate=4, pad_token_id=pad, seed=0)
    for _ in range(options.steps):
        report = session.step(next(steps))
        print(f"{report.step:5d}  loss {report.loss:.4f}  norm {report.grad_norm:.2f}  {report.tokens_per_s:.0f} tokens/s")
    print(f"held-out loss after:  {session.evaluate(evaluation).loss:.4f}")
    print(f"saved {session.save_pretrained(options.out, tokenizer=tokenizer)}")
