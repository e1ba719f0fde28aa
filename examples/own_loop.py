"""ShifCon in a loop of one's own: python examples/own_loop.py MODEL instructions.jsonl parallel.jsonl OUTPUT

Rows as docs/training.md has them. Runs on what PyTorch finds; with accelerate, prepare model, optimizer and loader.
"""

import itertools
import sys

import torch
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import shifcon_fast as sf
from shifcon_fast.data import read_instructions, read_parallel
from shifcon_fast.data.chat_template import end_of_turn
from shifcon_fast.training.batches.contrastive_data import ContrastiveSampler
from shifcon_fast.training.batches.instruction_data import InstructionCollator, InstructionDataset
from shifcon_fast.training.run.run_folder import RunState, save_run


def main(name: str, instructions: str, parallel: str, output: str, steps: int = 100) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = sf.load_quantized(name, lora, "nf4" if torch.cuda.is_available() else "none")
    sentences = read_parallel(parallel)
    space = sf.estimate_space(model, tokenizer, sentences)
    area = sf.recommend_area(space)
    handle = sf.attach(model, space, area.forward, area.backward)
    language_id = handle.shift.language_id

    data = InstructionDataset(read_instructions(instructions), tokenizer, language_id, max_length=512)
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=InstructionCollator(tokenizer))
    pairs = ContrastiveSampler(sentences, space.pivot, tokenizer, language_id, batch_size=8)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    model.train()
    losses = []
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, batch in enumerate(itertools.islice(batches, steps)):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        generation = model(**batch).loss  # batch["language_ids"] shifts each row
        contrastive = sf.mcl_loss(model, pairs.batch(step), handle)
        loss = 0.5 * generation + 2.0 * contrastive
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = RunState(handle=handle, tokenizer=tokenizer, end_of_turn=end_of_turn(tokenizer))
    save_run(output, model, state)  # sf.load(output) shifts as trained
    return losses


if __name__ == "__main__":
    print(main(*sys.argv[1:5])[-1])
