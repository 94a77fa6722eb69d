//! Every instruction set of this machine passes the corpus.
use flashattn_cpu::arch::Isa;
use flashattn_cpu::executor::CpuExecutor;
use flashattn_cpu::plan::Options;
use flashattn_spec::suite::{Runner, corpus, random_cases};

#[test]
fn every_isa_passes_the_corpus() {
    for isa in Isa::available().into_iter().rev() {
        let executor = CpuExecutor { options: Options { isa: Some(isa), threads: None } };
        let filter = std::env::var("CASE").unwrap_or_default();
        let mut cases = corpus();
        cases.extend(random_cases(2026, 100));
        let report = Runner::new().filter(&filter).run(&executor, &cases);
        println!("{isa}: {report}");
        // A filter that matches nothing fails, too.
        assert!(report.all_passed(), "{isa}: {report}");
    }
}
