//! Tensors in files: safetensors and .npy. What a file claims is checked against its length before anything is
//! allocated for it, and results are written whole or not at all.

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytemuck::Pod;
use flashattn_spec::{DType, Element};
use safetensors::{Dtype, SafeTensors};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

/// A tensor as bytes, in the order of the dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<'a> {
    /// Type of an element.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub data: Cow<'a, [u8]>,
}

/// The name of a file's dtype in the field's words.
fn dtype_name(dtype: Dtype) -> String {
    format!("{dtype:?}").to_lowercase()
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
    }
}

impl Tensor<'_> {
    /// The tensor's dtype, if attention can be computed in it.
    pub fn element_type(&self) -> Result<DType> {
        let types = [DType::F32, DType::Bf16, DType::F16];
        let found = types.into_iter().find(|t| file_dtype(*t) == self.dtype);
        found.ok_or_else(|| anyhow!("has dtype {}, expected f32, bf16 or f16", dtype_name(self.dtype)))
    }

    /// The elements as a type.
    ///
    /// # Errors
    /// If they are of another.
    pub fn elements<T: Element>(&self) -> Result<Vec<T>> {
        self.decode(file_dtype(T::DTYPE))
    }

    /// The elements as integers.
    ///
    /// # Errors
    /// If they are not i32 or i64, or too large.
    pub fn integers(&self) -> Result<Vec<i32>> {
        if self.dtype == Dtype::I64 {
            let wide: Vec<i64> = self.decode(Dtype::I64)?;
            return wide
                .into_iter()
                .map(|x| i32::try_from(x).with_context(|| format!("holds {x}")))
                .collect();
        }
        self.decode(Dtype::I32)
    }

    fn decode<T: Pod>(&self, dtype: Dtype) -> Result<Vec<T>> {
        let (got, expected) = (dtype_name(self.dtype), dtype_name(dtype));
        ensure!(self.dtype == dtype, "has dtype {got}, expected {expected}");
        Ok(bytemuck::pod_collect_to_vec(&self.data))
    }

    /// The shape, if it has so many dimensions.
    pub fn dimensions<const N: usize>(&self, names: &str) -> Result<[usize; N]> {
        let shape = &self.shape;
        shape
            .as_slice()
            .try_into()
            .map_err(|_| anyhow!("has shape {shape:?}, expected {N} dimensions {names}"))
    }
}

/// A tensor of these elements.
pub fn tensor<T: Element>(data: &[T], shape: &[usize]) -> Tensor<'static> {
    let data = Cow::Owned(bytemuck::cast_slice(data).to_vec());
    Tensor { dtype: file_dtype(T::DTYPE), shape: shape.to_vec(), data }
}

/// Named tensors and what is said about them.
#[derive(Debug, Default)]
pub struct TensorFile<'a> {
    /// By name.
    pub tensors: BTreeMap<String, Tensor<'a>>,
    /// Free text by name.
    pub metadata: HashMap<String, String>,
}

impl<'a> TensorFile<'a> {
    /// Parses a safetensors file.
    ///
    /// # Errors
    /// If it is truncated or contradicts itself.
    pub fn from_safetensors(bytes: &'a [u8]) -> Result<Self> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let file = SafeTensors::deserialize(bytes)?;
        let tensors = file.iter().map(|(name, view)| {
            let data = Cow::Borrowed(view.data());
            (name.to_owned(), Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), data })
        });
        Ok(TensorFile {
            tensors: tensors.collect(),
            metadata: metadata.metadata().clone().unwrap_or_default(),
        })
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// If it is not.
    pub fn get(&self, name: &str) -> Result<&Tensor<'a>> {
        self.tensors.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            anyhow!("there is no tensor {name:?}, only {}", names.join(", "))
        })
    }

    /// Writes a safetensors file.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn save(self, path: &Path) -> Result<()> {
        let metadata = (!self.metadata.is_empty()).then_some(self.metadata);
        let bytes = safetensors::serialize(self.tensors, metadata)?;
        write_whole(path, &bytes)
    }
}

impl safetensors::View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Reads a file.
///
/// # Errors
/// If the system refuses.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a file under another name beside it, then renames it: there is never a part of it.
///
/// # Errors
/// If the system refuses.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> Result<()> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the user's umask
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The first bytes of a .npy file.
const MAGIC: &[u8] = b"\x93NUMPY";

/// Parses a .npy file of format 1 to 3. (Crates for it allocate what a header asks for, and overflow on its shape.)
///
/// # Errors
/// If it is truncated, or holds what attention has no use for: another dtype, byte order or order of dimensions.
pub fn parse_npy(bytes: &[u8]) -> Result<Tensor<'_>> {
    let truncated = || anyhow!("is truncated in its header");
    ensure!(bytes.starts_with(MAGIC), "is not a .npy file: it does not start with \\x93NUMPY");
    let version = *bytes.get(6).ok_or_else(truncated)?;
    let (length, start) = match version {
        1 => (bytes.get(8..10).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))), 10),
        2 | 3 => (bytes.get(8..12).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize), 12),
        other => bail!("is .npy format {other}, expected 1, 2 or 3"),
    };
    let end = start + length.ok_or_else(truncated)?;
    let header = std::str::from_utf8(bytes.get(start..end).ok_or_else(truncated)?).context("header")?;
    let value = |key: &str| {
        let (_, rest) =
            header.split_once(&format!("'{key}':")).with_context(|| format!("header has no '{key}'"))?;
        Ok::<_, anyhow::Error>(rest.trim_start())
    };
    let (_, descr) = value("descr")?.split_once('\'').context("'descr' is not a plain type")?;
    let descr = descr.split('\'').next().unwrap_or_default();
    let dtype = match descr {
        "<f4" => Dtype::F32,
        "<f2" => Dtype::F16,
        "<i4" => Dtype::I32,
        "<i8" => Dtype::I64,
        _ => bail!("has dtype {descr:?}, expected <f4, <f2, <i4 or <i8 (numpy has no bf16: use safetensors)"),
    };
    ensure!(
        value("fortran_order")?.starts_with("False"),
        "is in Fortran order, expected C order; save numpy.ascontiguousarray(x)"
    );
    let shape = value("shape")?
        .strip_prefix('(')
        .and_then(|s| s.split_once(')'))
        .context("'shape' is not a tuple")?;
    let shape = shape.0.split(',').map(str::trim).filter(|d| !d.is_empty());
    let shape: Vec<usize> =
        shape.map(|d| d.parse().with_context(|| format!("dimension {d:?}"))).collect::<Result<_>>()?;
    let expected = shape.iter().try_fold(dtype.bitsize() / 8, |n, &d| n.checked_mul(d));
    let data = &bytes[end..];
    ensure!(
        expected == Some(data.len()),
        "has {} bytes of data, expected those of shape {shape:?} in {}; the file is truncated or damaged",
        data.len(),
        dtype_name(dtype)
    );
    Ok(Tensor { dtype, shape, data: Cow::Borrowed(data) })
}

/// The bytes of a .npy file.
///
/// # Errors
/// If numpy has no such dtype.
pub fn npy_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let descr = match tensor.dtype {
        Dtype::F32 => "<f4",
        Dtype::F16 => "<f2",
        other => bail!("numpy has no {}: write a .safetensors file instead", dtype_name(other)),
    };
    let shape: String = tensor.shape.iter().map(|d| format!("{d}, ")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    // Spaces and a newline, so that the data starts at a multiple of 64.
    let length = (header.len() + 11).next_multiple_of(64) - 10;
    header = format!("{header:<width$}\n", width = length - 1);
    let length = u16::try_from(length).context("too many dimensions")?.to_le_bytes();
    Ok([MAGIC, &[1, 0], &length, header.as_bytes(), &tensor.data].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(header: &str, data: &[u8]) -> Vec<u8> {
        [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), data].concat()
    }

    #[test]
    fn npy_round_trip() {
        let x = tensor::<f32>(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1, 2, 3]);
        let bytes = npy_bytes(&x).unwrap();
        assert_eq!((bytes.len() - 24) % 64, 0, "data is aligned");
        let back = parse_npy(&bytes).unwrap();
        assert_eq!(back, x);
        assert_eq!(back.elements::<f32>().unwrap()[5], 6.0);
        for cut in 0..bytes.len() {
            assert!(parse_npy(&bytes[..cut]).is_err(), "{cut} of {} bytes", bytes.len());
        }
        assert!(npy_bytes(&tensor(&[half::bf16::ONE], &[1])).unwrap_err().to_string().contains("no bf16"));
    }

    #[test]
    fn hostile_npy_is_refused() {
        for (header, text) in [
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551615, 9), }",
                "truncated or damaged",
            ),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,), }", "dimension"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", "dimension"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1", "not a tuple"),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (1,), }", "Fortran"),
            ("{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", "\">f4\", expected <f4"),
            ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", "dtype \"a\""),
            ("{'fortran_order': False, 'shape': (1,), }", "no 'descr'"),
            (&"(".repeat(60000), "no 'descr'"),
        ] {
            let error = format!("{:#}", parse_npy(&npy(header, &[0; 4])).unwrap_err());
            assert!(error.contains(text), "{error}");
        }
        let huge = [MAGIC, &[2, 0], &u32::MAX.to_le_bytes(), b"{"].concat();
        assert!(parse_npy(&huge).unwrap_err().to_string().contains("truncated in its header"));
    }

    #[test]
    fn safetensors_round_trip_and_truncation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let x = tensor::<f32>(&[1.0, 2.0], &[2]);
        let metadata = HashMap::from([("causal".to_owned(), "true".to_owned())]);
        TensorFile { tensors: [("q".to_owned(), x.clone())].into(), metadata }.save(&path).unwrap();
        let bytes = read(&path).unwrap();
        let file = TensorFile::from_safetensors(&bytes).unwrap();
        assert_eq!((file.get("q").unwrap(), file.metadata["causal"].as_str()), (&x, "true"));
        assert_eq!(file.get("k").unwrap_err().to_string(), "there is no tensor \"k\", only q");
        let error = file.get("q").unwrap().elements::<half::f16>().unwrap_err().to_string();
        assert_eq!(error, "has dtype f32, expected f16");
        for cut in 0..bytes.len() {
            assert!(TensorFile::from_safetensors(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn nothing_is_left_where_writing_fails() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_whole(&folder.path().join("no/x"), b"x").unwrap_err();
        assert!(error.to_string().starts_with("cannot write"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
