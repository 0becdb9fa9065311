//! Whatever bytes come, reading, inspecting and converting an adapter ends with a result or an error: no panic, no
//! runaway memory. What is done with the bytes is in `reader/mod.rs`, which the tests run on kept inputs too.
#![no_main]

mod reader;

libfuzzer_sys::fuzz_target!(|data: &[u8]| reader::read(data));
