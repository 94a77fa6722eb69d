//! `flashattn check`: the corpus of cases ([`flashattn_spec::suite`]) on a device.

use crate::options::{self, ComputeArgs};
use anyhow::{Result, ensure};
use clap::Args;
use flashattn::{Device, Error, Plan};
use flashattn_cpu::executor::CpuExecutor;
use flashattn_spec::suite::{ExecError, Executor, Report, Runner, corpus, random_cases};
use flashattn_spec::{AttentionProblem, Element, GradInputs, Gradients, Inputs, Outputs};
use rayon::prelude::*;
use std::io::Write;

const EXAMPLES: &str = "\
Examples:
  flashattn check
      every case of the corpus on this CPU
  flashattn check --isa avx512 --filter window --json
      those with a window, with one instruction set, as JSON
  flashattn check --random 1000 --seed 7
      a thousand random combinations besides
  flashattn check --device cuda --deterministic
      on a GPU, with gradients that have the same bits in every run

Right means: no output is farther from the f64 oracle than twice what standard attention errs in the same type, plus a
few roundings. Exit status 1 if a case fails, is skipped, or none was run. A GPU refuses f32 and head_dim above 256, by name:
there such cases are listed, and do not make the status 1 as long as others pass.";

/// Options of `flashattn check`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct CheckArgs {
    #[command(flatten)]
    compute: ComputeArgs,
    /// Run only cases whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    filter: String,
    /// Run N random cases besides the corpus
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    random: usize,
    /// Seed of the random cases
    #[arg(long, value_name = "S", default_value_t = 0, requires = "random")]
    seed: u64,
    /// Gradients with the same bits in every run, as on the CPU always, on a GPU too
    #[arg(long)]
    deterministic: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the cases and prints the report.
///
/// # Errors
/// If a case does not pass, or none was run.
pub fn run(args: &CheckArgs) -> Result<()> {
    let options = args.compute.options()?;
    options::start_threads(args.compute.threads())?;
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
    bar.set_length(cases.len() as u64);
    let runner = || {
        Runner::new().on_progress(|done, _, name| {
            bar.inc(u64::from(done > 0));
            bar.set_message(name.to_owned());
        })
    };
    let report = match args.compute.device {
        Device::Cpu => runner().run(&CpuExecutor { options }, &cases),
        device => {
            // What no problem can be planned on is no report of refusals.
            usable(device)?;
            let facade = Facade { device, deterministic: args.deterministic };
            // Compiling kernels and asking the oracle take the time.
            let reports = cases.par_chunks(SHARE).map(|share| runner().run(&facade, share));
            reports.reduce(Report::default, Report::merge)
        }
    };
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    let Report { cases, passed, failed, skipped, .. } = &report;
    let right = if args.compute.on_gpu() { *failed == 0 && *passed > 0 } else { report.all_passed() };
    ensure!(right, "{failed} of {cases} cases failed, {skipped} were skipped");
    Ok(())
}

/// Cases that a thread takes at once.
const SHARE: usize = 16;

/// Plans something small.
fn usable(device: Device) -> Result<()> {
    let p = AttentionProblem::new(1, 1, 1, 64, flashattn_spec::DType::Bf16);
    Plan::<half::bf16>::from_problem(p, None, device)?;
    Ok(())
}

/// A device, through the facade.
struct Facade {
    device: Device,
    /// Of backward passes.
    deterministic: bool,
}

impl Facade {
    fn plan<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<'_, T>,
    ) -> Result<Plan<T>, ExecError> {
        Plan::from_problem(problem.clone(), inputs.sinks.map(Into::into), self.device).map_err(exec)
    }
}

fn exec(error: Error) -> ExecError {
    match error {
        Error::Unsupported { feature, .. } => ExecError::Unsupported { feature },
        other => ExecError::Failed(other.to_string()),
    }
}

impl Executor for Facade {
    fn device(&self) -> String {
        format!("{}{}", self.device, if self.deterministic { ", deterministic" } else { "" })
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<'_, T>,
        outputs: &mut Outputs<'_, T>,
    ) -> Result<(), ExecError> {
        let plan = self.plan(problem, inputs)?;
        plan.forward(&inputs.q, &inputs.k, &inputs.v, &mut outputs.o, outputs.lse).map_err(exec)
    }

    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<'_, T>,
        given: &GradInputs<'_, T>,
        gradients: &mut Gradients<'_, T>,
    ) -> Result<(), ExecError> {
        let plan = self.plan(problem, inputs)?.deterministic(self.deterministic).map_err(exec)?;
        plan.backward(&inputs.q, &inputs.k, &inputs.v, given, gradients).map_err(exec)
    }
}
