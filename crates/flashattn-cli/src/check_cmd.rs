//! `flashattn check`: the corpus of cases ([`flashattn_spec::suite`]) on a device.

use crate::options::{self, CpuArgs};
use anyhow::{Result, ensure};
use clap::Args;
use flashattn_cpu::executor::CpuExecutor;
use flashattn_spec::suite::{Report, Runner, corpus, random_cases};
use std::io::Write;

const EXAMPLES: &str = "\
Examples:
  flashattn check
      every case of the corpus on this CPU
  flashattn check --isa avx512 --filter window --json
      those with a window, with one instruction set, as JSON
  flashattn check --random 1000 --seed 7
      a thousand random combinations besides

Right means: no output is farther from the f64 oracle than twice what standard attention errs in the same type, plus a
few roundings. Exit status 1 if a case fails, is skipped, or none was run.";

/// Options of `flashattn check`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct CheckArgs {
    #[command(flatten)]
    cpu: CpuArgs,
    /// Run only cases whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    filter: String,
    /// Run N random cases besides the corpus
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    random: usize,
    /// Seed of the random cases
    #[arg(long, value_name = "S", default_value_t = 0, requires = "random")]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the cases and prints the report.
///
/// # Errors
/// If a case does not pass, or none was run.
pub fn run(args: &CheckArgs) -> Result<()> {
    let executor = CpuExecutor { options: args.cpu.options()? };
    options::start_threads(args.cpu.threads())?;
    let mut cases = corpus();
    cases.extend(random_cases(args.seed, args.random));
    let (filter, all) = (&args.filter, cases.len());
    cases.retain(|case| case.name.contains(filter));
    // Before any report: one of 0 cases would look like success.
    ensure!(
        !cases.is_empty(),
        "--filter {filter:?}: none of {all} cases has that in its name; try a shorter one"
    );
    let bar = options::progress(0);
    let runner = Runner::new().on_progress(|done, all, name| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(name.to_owned());
    });
    let report = runner.run(&executor, &cases);
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    let Report { cases, failed, skipped, .. } = &report;
    ensure!(report.all_passed(), "{failed} of {cases} cases failed, {skipped} were skipped");
    Ok(())
}
