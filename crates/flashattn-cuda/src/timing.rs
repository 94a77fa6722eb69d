//! Times of launches, by the GPU's own clock.
//!
//! Two regimes, never to be mixed: [`cold`] flushes L2 before each launch, [`sustained`] launches back to back for 150 ms
//! a loop. A power-limited card runs faster in the first (`benches/` compares kernels in the second, as `peers.py` does).

use crate::device::Stream;
use crate::error::Error;

/// Milliseconds a launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Half of the samples are shorter.
    pub median_ms: f64,
    /// The shortest sample.
    pub min_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// Launches that a sample is the mean of.
    pub launches: usize,
}

/// Milliseconds of a loop of [`sustained`].
pub const LOOP_MS: f64 = 150.0;

/// Loops of [`sustained`].
const LOOPS: usize = 3;

/// Times `runs` single launches (at least 1), each after L2 has been overwritten; after one that is not timed.
pub fn cold<E: From<Error>>(
    stream: &Stream,
    runs: usize,
    mut launch: impl FnMut(&Stream) -> Result<(), E>,
) -> Result<Timing, E> {
    let device = stream.device();
    // Twice the cache, so that no line of the last launch stays.
    let flush = device.alloc(2 * device.properties().l2_bytes)?;
    launch(stream)?;
    let mut marks = Vec::new();
    for run in 0..runs.max(1) {
        let (begin, end) = (device.event()?, device.event()?);
        flush.fill(stream, run as u8)?;
        begin.record(stream)?;
        launch(stream)?;
        end.record(stream)?;
        marks.push((begin, end));
    }
    stream.synchronize()?;
    let samples = marks.iter().map(|(begin, end)| end.elapsed_ms(begin)).collect::<Result<Vec<_>, _>>()?;
    Ok(summary(samples, 1))
}

/// Times launches back to back: three loops of about [`LOOP_MS`], at least 10 launches each.
pub fn sustained<E: From<Error>>(
    stream: &Stream,
    mut launch: impl FnMut(&Stream) -> Result<(), E>,
) -> Result<Timing, E> {
    let (begin, end) = (stream.device().event()?, stream.device().event()?);
    let mut repeat = |times: usize| {
        begin.record(stream)?;
        for _ in 0..times {
            launch(stream)?;
        }
        end.record(stream)?;
        end.synchronize()?;
        Ok::<f64, E>(end.elapsed_ms(&begin)? / times as f64)
    };
    repeat(2)?;
    let launches = repetitions(repeat(5)?);
    let samples = (0..LOOPS).map(|_| repeat(launches)).collect::<Result<Vec<_>, _>>()?;
    Ok(summary(samples, launches))
}

/// Launches of this length that fill a loop.
fn repetitions(ms: f64) -> usize {
    ((LOOP_MS / ms.max(1e-4)) as usize).max(10)
}

fn summary(mut samples: Vec<f64>, launches: usize) -> Timing {
    samples.sort_by(f64::total_cmp);
    let (middle, last) = (samples.len() / 2, samples.len() - 1);
    let median_ms =
        if samples.len() % 2 == 1 { samples[middle] } else { (samples[middle - 1] + samples[middle]) / 2.0 };
    Timing { median_ms, min_ms: samples[0], max_ms: samples[last], launches }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries() {
        let timing = summary(vec![3.0, 1.0, 2.0], 7);
        assert_eq!(timing, Timing { median_ms: 2.0, min_ms: 1.0, max_ms: 3.0, launches: 7 });
        assert_eq!(summary(vec![4.0, 1.0], 1).median_ms, 2.5);
    }

    #[test]
    fn loops_are_long_and_finite() {
        assert_eq!(repetitions(1.0), 150);
        assert_eq!(repetitions(100.0), 10);
        assert_eq!(repetitions(0.0), 1_500_000);
    }
}
