//! Time and memory of one block at the real width (24 heads of 128) with 4096 + 512 tokens, the tokens of a 1024 x 1024
//! image and the longest prompt: forward and backward, with adapters on all its linears.
//!
//! ```sh
//! cargo bench --bench attention_block
//! ```
//!
//! Prints one line for each way of keeping activations, and fails if one of them holds 2 GB or more beyond weights and
//! inputs. The scores of all heads, which are never held at once, would be 2 GB alone. Takes 3.5 GB of memory.

#[path = "../tests/block_memory/mod.rs"]
mod block_memory;

use block_memory::{Counting, HEADS, RealBlock};
use qwen_lora::model::transformer::Checkpointing;
use std::time::Instant;

#[global_allocator]
static COUNTING: Counting = Counting;

const SIDE: usize = 64;
const TEXT: usize = 512;

fn main() {
    let tokens = SIDE * SIDE + TEXT;
    let scores = HEADS * tokens * tokens * 4;
    println!("{tokens} tokens; the scores of all heads would be {:.2} GB", scores as f64 / 1e9);
    let block = RealBlock::new();
    let mut first = None;
    for keep in [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full] {
        let began = Instant::now();
        let measured = block.run(SIDE, TEXT, keep);
        let seconds = began.elapsed().as_secs_f64();
        println!("{keep:?}: {:.2} s, {:.2} GB held at most", seconds, measured.peak_bytes as f64 / 1e9);
        let first = first.get_or_insert(measured.gradients.clone());
        assert!(measured.gradients == *first, "{keep:?} changes the gradients");
        assert!(measured.peak_bytes < 2_000_000_000, "{keep:?} holds {} bytes", measured.peak_bytes);
    }
}
