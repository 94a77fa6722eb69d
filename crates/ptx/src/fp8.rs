//! The two 8-bit floats of the tensor cores: e4m3 (no infinity, largest 448) and e5m2 (largest 57344).

/// Nearest e4m3 value, ties to even, saturating at ±448; NaN stays NaN.
pub fn e4m3(x: f32) -> u8 {
    encode(x, 4, 3, 448.0, 0x7f)
}

/// Nearest e5m2 value, ties to even, saturating at ±57344; NaN stays NaN.
pub fn e5m2(x: f32) -> u8 {
    encode(x, 5, 2, 57344.0, 0x7f)
}

/// The value of an e4m3.
pub fn from_e4m3(bits: u8) -> f32 {
    if bits & 0x7f == 0x7f { f32::NAN } else { decode(bits, 4, 3) }
}

/// The value of an e5m2.
pub fn from_e5m2(bits: u8) -> f32 {
    match bits & 0x7f {
        0x7c => f32::INFINITY.copysign(if bits & 0x80 == 0 { 1.0 } else { -1.0 }),
        0x7d..=0x7f => f32::NAN,
        _ => decode(bits, 5, 2),
    }
}

fn decode(bits: u8, exponent_bits: i32, mantissa_bits: i32) -> f32 {
    let bias = (1 << (exponent_bits - 1)) - 1;
    let exponent = (bits & 0x7f) as i32 >> mantissa_bits;
    let mantissa = (bits as i32 & ((1 << mantissa_bits) - 1)) as f32;
    let one = (1 << mantissa_bits) as f32;
    let magnitude = if exponent == 0 {
        mantissa / one * 2f32.powi(1 - bias)
    } else {
        (1.0 + mantissa / one) * 2f32.powi(exponent - bias)
    };
    magnitude.copysign(if bits & 0x80 == 0 { 1.0 } else { -1.0 })
}

fn encode(x: f32, exponent_bits: i32, mantissa_bits: i32, largest: f32, nan: u8) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | nan;
    }
    let bias = (1 << (exponent_bits - 1)) - 1;
    let x = x.abs().min(largest);
    // The unit in the last place of x's binade; below the smallest normal it stays that of the smallest normal.
    let exponent = ((x.to_bits() >> 23) as i32 - 127).max(1 - bias);
    let units = (x as f64 * 2f64.powi(mantissa_bits - exponent)).round_ties_even() as i32;
    // A carry into the next binade is what adding to the exponent field does by itself.
    let field = exponent + bias - 1;
    sign | (units + (field << mantissa_bits)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_comes_back() {
        for bits in 0..=255u8 {
            if !from_e4m3(bits).is_nan() {
                assert_eq!(e4m3(from_e4m3(bits)), bits);
            }
            if from_e5m2(bits).is_finite() {
                assert_eq!(e5m2(from_e5m2(bits)), bits);
            }
        }
    }

    #[test]
    fn rounding() {
        assert_eq!(from_e4m3(e4m3(1e9)), 448.0);
        assert_eq!(from_e5m2(e5m2(f32::NEG_INFINITY)), -57344.0);
        assert_eq!(from_e4m3(e4m3(17.0)), 16.0); // a tie, to even
        assert_eq!(from_e4m3(e4m3(19.0)), 20.0);
        assert_eq!(from_e4m3(e4m3(0.001)), 0.001953125);
        assert!(from_e4m3(e4m3(f32::NAN)).is_nan() && from_e5m2(e5m2(f32::NAN)).is_nan());
    }
}
