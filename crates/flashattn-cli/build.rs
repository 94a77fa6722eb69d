//! Tells the binary which commit it was built from: rows of `bench` carry it.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let log = Path::new("../../.git/logs/HEAD");
    if log.exists() {
        println!("cargo::rerun-if-changed={}", log.display());
        if let Ok(git) = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output()
            && git.status.success()
        {
            println!("cargo::rustc-env=FLASHATTN_COMMIT={}", String::from_utf8_lossy(&git.stdout).trim());
        }
    }
}
