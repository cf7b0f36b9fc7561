//! The `helion` binary. Everything is in the library; see [`helion::cli`].

fn main() -> std::process::ExitCode {
    helion::cli::main(std::env::args_os().collect())
}
