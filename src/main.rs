fn main() -> std::process::ExitCode {
    qwen_lora::cli::main()
}
