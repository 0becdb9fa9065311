//! LoRA adapters: which modules they attach to, their numbers, their files. Knows no particular network.

pub mod target;
