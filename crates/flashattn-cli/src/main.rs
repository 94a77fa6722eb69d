//! `flashattn`: FlashAttention on the command line.

mod attention;
mod bench;
mod check_cmd;
mod demo;
mod gpu;
mod io_cmd;
mod memory;
mod mods;
mod options;
mod plot;
mod problem;
mod ptx_cmd;
mod run_cmd;
mod tensor_file;

use clap::{CommandFactory, Parser, Subcommand};
use std::io;
use std::process::ExitCode;

/// Exact attention, fast and with memory linear in sequence length (FlashAttention, arXiv 2205.14135).
#[derive(Debug, Parser)]
#[command(name = "flashattn", version, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

#[derive(Debug, Subcommand)]
enum Command {
    /// Run attention of two trained models on a real text: is it exact, how fast, how much memory?
    Demo(demo::DemoArgs),
    /// Compute attention, or its gradients, of tensors in files
    Run(Box<run_cmd::RunArgs>),
    /// Put every case of the test corpus to a device
    Check(check_cmd::CheckArgs),
    /// Time passes over a grid of sizes
    Bench(Box<bench::BenchArgs>),
    /// Count what attention computes and moves, and which of the two takes longer
    Io(Box<io_cmd::IoArgs>),
    /// Show the GPU kernel of a problem: its PTX, what it needs, which blocks it computes
    Ptx(Box<ptx_cmd::PtxArgs>),
    /// Print completions for a shell
    #[command(after_help = "Example (bash):\n  flashattn completions bash > \
                            ~/.local/share/bash-completion/completions/flashattn")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Run(args) => run_cmd::run(&args),
        Command::Check(args) => check_cmd::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Io(args) => io_cmd::run(&args),
        Command::Ptx(args) => ptx_cmd::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "flashattn", &mut io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has seen enough (`flashattn io | head`).
        Err(error) if options::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_options_is_consistent() {
        Cli::command().debug_assert();
    }
}
