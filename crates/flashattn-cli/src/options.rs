//! What subcommands share: values of options, and numbers for people.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use flashattn_spec::DType;

/// Parser of `--dtype`, for the executors' types.
pub fn dtype() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(["f16", "bf16", "f32"]).map(|name| match name.as_str() {
        "f16" => DType::F16,
        "bf16" => DType::Bf16,
        _ => DType::F32,
    })
}

/// Parser of a length or a size in bytes: `4096`, `4k` (4096), `1M` (1048576).
pub fn count(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1 << 10),
        None => text.strip_suffix('M').map_or((text, 1), |digits| (digits, 1 << 20)),
    };
    let number: usize = digits.parse().map_err(|_| "expected a number such as 4096, 4k or 1M".to_string())?;
    number.checked_mul(unit).ok_or_else(|| "too large".to_string())
}

/// A number with three digits and a decimal prefix: `40.3 G`.
pub fn si(x: f64) -> String {
    const LARGE: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    const SMALL: [&str; 4] = ["", "m", "µ", "n"];
    if x == 0.0 || !x.is_finite() {
        return format!("{x} ");
    }
    let power = (x.abs().log10() / 3.0 + 1e-9).floor() as i32;
    let power = power.clamp(-(SMALL.len() as i32 - 1), LARGE.len() as i32 - 1);
    let prefix = if power < 0 { SMALL[power.unsigned_abs() as usize] } else { LARGE[power as usize] };
    let scaled = x / 1000f64.powi(power);
    let digits = if scaled.abs() >= 99.95 {
        0
    } else if scaled.abs() >= 9.995 {
        1
    } else {
        2
    };
    format!("{scaled:.digits$} {prefix}")
}

/// A length as people write it: `512`, `4k`, `1M`.
pub fn length(n: usize) -> String {
    const M: usize = 1 << 20;
    match n {
        0 => "0".into(),
        n if n.is_multiple_of(M) => format!("{}M", n / M),
        n if n.is_multiple_of(1024) => format!("{}k", n / 1024),
        n => n.to_string(),
    }
}

/// Whether standard output was closed by its reader.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |e: &(dyn std::error::Error + 'static)| {
        e.downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind)
            .or_else(|| e.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind))
    };
    error.chain().any(|e| kind(e) == Some(std::io::ErrorKind::BrokenPipe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!(count("77"), Ok(77));
        assert_eq!(count("4k"), Ok(4096));
        assert_eq!(count("192K"), Ok(192 << 10));
        assert_eq!(count("1M"), Ok(1 << 20));
        for bad in ["", "k", "-1", "4kk", "1.5k", "99999999999999999999", "18446744073709551615k"] {
            assert!(count(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(si(40.3e9), "40.3 G");
        assert_eq!(si(4.379e9), "4.38 G");
        assert_eq!(si(1000.0), "1.00 k");
        assert_eq!(si(962.1e9), "962 G");
        assert_eq!(si(0.00731), "7.31 m");
        assert_eq!(si(2.5e-7), "250 n");
        assert_eq!(si(0.0), "0 ");
        assert_eq!((length(512), length(4096), length(1 << 20)), ("512".into(), "4k".into(), "1M".into()));
    }

    #[test]
    fn a_closed_pipe_is_recognised() {
        let io = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&anyhow::Error::from(io()).context("writing")));
        assert!(is_broken_pipe(&anyhow::Error::from(serde_json::Error::io(io()))));
        assert!(!is_broken_pipe(&anyhow::anyhow!("Broken pipe")));
    }
}
