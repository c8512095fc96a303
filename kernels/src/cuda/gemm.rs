//! Products of many rows: cuBLASLt. Its meaning is that of [`super::Linear`].
//!
//! The library proposes ways for a shape; [`Gemm::tune`] times the first ones and keeps the best. A launch without that takes the
//! first. Either is asked for once per shape, so that a launch neither waits nor takes memory on the device.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::ptr::from_ref;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtGetVersion, cublasLtHandle_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulAlgoCheck, cublasLtMatmulAlgoGetHeuristic, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasLtReductionScheme_t,
    cublasStatus_t, cudaDataType, is_culib_present,
};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DriverError};
use serde_json::{Map, Value, json};

use super::{DeviceError, Kernels, LaunchError, Linear, Onto, Real};
use crate::cpu::KernelError;

/// Device memory that the library may use, as NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Proposals that are timed.
const PROPOSALS: usize = 8;
/// Launches of a timing, and timings of a proposal: the least counts.
const LAUNCHES: usize = 10;
const TIMINGS: usize = 3;

/// The library with what it has chosen.
#[derive(Debug)]
pub struct Gemm {
    library: Library,
    workspace: CudaSlice<u8>,
    plans: HashMap<(&'static str, Linear), Plan>,
    kept: Choices,
}

// SAFETY: handles and descriptions of the library belong to no thread, and nothing here is shared between threads.
unsafe impl Send for Gemm {}

impl Gemm {
    /// Opens the library. `choices`: the file where they are kept; one that does not fit, or none, is as an empty one.
    ///
    /// # Errors
    /// When the library is not there or refuses, or the device has not as much memory.
    pub fn open(kernels: &Kernels, choices: Option<&Path>) -> Result<Self, DeviceError> {
        let context = kernels.stream().context();
        context
            .bind_to_thread()
            .map_err(|source| DeviceError::Driver { what: "use the device", source })?;
        let library = Library::open()?;
        let kept = Choices::read(choices, kernels.name(), library.version());
        Ok(Self { library, workspace: kernels.memory(WORKSPACE)?, plans: HashMap::new(), kept })
    }

    /// Times what the library proposes for a shape and keeps the best, unless it is kept already. `x` and `out` as in
    /// [`Linear::reference`], `out` is undefined afterwards; `weights` are used in turn: as many as exceed the second cache.
    ///
    /// Waits for the device, so not while a graph is captured.
    ///
    /// # Errors
    /// When lengths do not fit, or the library refuses every proposal.
    pub fn tune<T: Real>(
        &mut self,
        kernels: &Kernels,
        shape: &Linear,
        (x, weights): (&CudaSlice<T>, &[&CudaSlice<T>]),
        out: &mut CudaSlice<T>,
    ) -> Result<(), LaunchError> {
        if self.kept.algorithms.contains_key(&name::<T>(shape)) {
            return Ok(());
        }
        let (library, mut best) = (self.library.0, None::<(f32, cublasLtMatmulAlgo_t)>);
        for proposal in self.plan::<T>(shape)?.propose(library, PROPOSALS)? {
            self.plan::<T>(shape)?.algorithm = proposal.algo;
            // One that fails is none.
            let Ok(time) = self.time(kernels, shape, (x, weights), out) else { continue };
            if best.is_none_or(|(least, _)| time < least) {
                best = Some((time, proposal.algo));
            }
        }
        let none = || LaunchError::Unsupported(format!("{shape:?} in cuBLASLt"));
        let (_, algorithm) = best.ok_or_else(none)?;
        self.plan::<T>(shape)?.algorithm = algorithm;
        self.kept.algorithms.insert(name::<T>(shape), algorithm.data);
        Ok(())
    }

    /// Writes what [`Self::tune`] has found to the file, if there is one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self) -> std::io::Result<()> {
        self.kept.write()
    }

    /// Milliseconds of some launches.
    fn time<T: Real>(
        &mut self,
        kernels: &Kernels,
        shape: &Linear,
        (x, weights): (&CudaSlice<T>, &[&CudaSlice<T>]),
        out: &mut CudaSlice<T>,
    ) -> Result<f32, LaunchError> {
        let refused = |source| LaunchError::Driver { what: "to time a product", source };
        let first =
            weights.first().ok_or(KernelError::Length { what: "weights", wanted: 1, got: 0 })?;
        kernels.gemm(shape, (x, first), out, self)?;
        let mut least = f32::INFINITY;
        for _ in 0..TIMINGS {
            let begin = event(kernels).map_err(refused)?;
            for w in weights.iter().cycle().take(LAUNCHES) {
                kernels.gemm(shape, (x, w), out, self)?;
            }
            let end = event(kernels).map_err(refused)?;
            least = least.min(begin.elapsed_ms(&end).map_err(refused)?);
        }
        Ok(least)
    }

    /// The plan of a shape, made when it is first asked for.
    fn plan<T: Real>(&mut self, shape: &Linear) -> Result<&mut Plan, LaunchError> {
        let key = (T::NAME, *shape);
        if !self.plans.contains_key(&key) {
            let kept = self.kept.algorithms.get(&name::<T>(shape)).copied();
            let plan = Plan::new::<T>(shape, self.library.0, kept)?;
            self.plans.insert(key, plan);
        }
        self.plans.get_mut(&key).ok_or_else(|| LaunchError::Unsupported(name::<T>(shape)))
    }
}

fn event(kernels: &Kernels) -> Result<cudarc::driver::CudaEvent, DriverError> {
    kernels.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
}

/// What a shape is called in the file.
fn name<T: Real>(shape: &Linear) -> String {
    let onto = match shape.onto {
        Onto::Nothing => "",
        Onto::Residual => " residual",
    };
    format!("{} {}x{}x{}{onto}", T::NAME, shape.rows, shape.outputs, shape.inputs)
}

/// What was chosen for a device and a version of the library, by the names of shapes. The library's documentation allows that its
/// description of an algorithm is written down and used again with the same version.
#[derive(Debug)]
struct Choices {
    path: Option<PathBuf>,
    device: String,
    version: usize,
    algorithms: HashMap<String, [u64; 8]>,
}

impl Choices {
    fn read(path: Option<&Path>, device: String, version: usize) -> Self {
        let empty =
            Self { path: path.map(Path::to_owned), device, version, algorithms: HashMap::new() };
        let text = path.and_then(|path| std::fs::read_to_string(path).ok());
        let algorithms = text.and_then(|text| empty.parse(&text)).unwrap_or_default();
        Self { algorithms, ..empty }
    }

    /// Absent: it is not of this device and version, or no such file.
    fn parse(&self, text: &str) -> Option<HashMap<String, [u64; 8]>> {
        let file: Value = serde_json::from_str(text).ok()?;
        if file["device"] != self.device.as_str() || file["cublaslt"] != self.version {
            return None;
        }
        let algorithm = |(name, words): (&String, &Value)| {
            let words: Option<Vec<u64>> = words.as_array()?.iter().map(Value::as_u64).collect();
            Some((name.clone(), words?.try_into().ok()?))
        };
        file["algorithms"].as_object()?.iter().map(algorithm).collect()
    }

    fn text(&self) -> String {
        let algorithms: Map<String, Value> =
            self.algorithms.iter().map(|(name, words)| (name.clone(), json!(words))).collect();
        json!({ "device": self.device, "cublaslt": self.version, "algorithms": algorithms })
            .to_string()
    }

    /// Readers see the old file or the new one, never a part.
    fn write(&self) -> std::io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let part = path.with_extension(format!("{}.part", std::process::id()));
        std::fs::write(&part, self.text())?;
        std::fs::rename(&part, path)
    }
}

/// The library's handle.
#[derive(Debug)]
struct Library(cublasLtHandle_t);

impl Library {
    fn open() -> Result<Self, DeviceError> {
        // SAFETY: opens the library and closes it again.
        if !unsafe { is_culib_present() } {
            return Err(DeviceError::NoLibrary);
        }
        let handle = result::create_handle();
        Ok(Self(handle.map_err(|source| DeviceError::Library { what: "open cuBLASLt", source })?))
    }

    fn version(&self) -> usize {
        // SAFETY: reads a number.
        unsafe { cublasLtGetVersion() }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the handle is live, and nobody has it any more. Nothing can be done about an error.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// What the library must know of a matrix. Its own order is by columns: a matrix of ours is the transposed one of it.
#[derive(Debug)]
struct Layout(cublasLtMatrixLayout_t);

impl Layout {
    fn new<T: Real>(rows: u32, width: u32) -> Result<Self, CublasError> {
        result::create_matrix_layout(dtype::<T>(), width.into(), rows.into(), width.into())
            .map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it is live, and nobody has it any more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What the library must know of a product.
#[derive(Debug)]
struct Operation(cublasLtMatmulDesc_t);

impl Operation {
    /// With the first factor, the weights, transposed.
    fn new() -> Result<Self, CublasError> {
        let made = result::create_matmul_desc(
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cudaDataType::CUDA_R_32F,
        );
        let made = made.map(Self)?;
        let attribute = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let transposed = 1_i32;
        // SAFETY: it is live; the attribute is a number of 4 bytes.
        unsafe {
            result::set_matmul_desc_attribute(
                made.0,
                attribute,
                from_ref(&transposed).cast(),
                size_of::<i32>(),
            )
        }?;
        Ok(made)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: it is live, and nobody has it any more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What proposals have to respect.
#[derive(Debug)]
struct Preference(cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CublasError> {
        use cublasLtMatmulPreferenceAttributes_t as Attribute;
        let made = result::create_matmul_pref().map(Self)?;
        let (bytes, sums) =
            (WORKSPACE, cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32);
        let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: it is live; the attribute is a number of 8 bytes.
        unsafe {
            result::set_matmul_pref_attribute(
                made.0,
                attribute,
                from_ref(&bytes).cast(),
                size_of::<usize>(),
            )
        }?;
        // Parts of a sum are not rounded to the dtype.
        let attribute = Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
        // SAFETY: it is live; the attribute is a number of 4 bytes.
        unsafe {
            result::set_matmul_pref_attribute(
                made.0,
                attribute,
                from_ref(&sums).cast(),
                size_of::<u32>(),
            )
        }?;
        Ok(made)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it is live, and nobody has it any more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn dtype<T: Real>() -> cudaDataType {
    if T::NAME == "bf16" { cudaDataType::CUDA_R_16BF } else { cudaDataType::CUDA_R_16F }
}

/// A shape as the library wants it, with the algorithm that is used.
#[derive(Debug)]
struct Plan {
    operation: Operation,
    w: Layout,
    x: Layout,
    out: Layout,
    algorithm: cublasLtMatmulAlgo_t,
}

impl Plan {
    /// With an algorithm that was kept, if the library still takes it, or the first that it proposes.
    fn new<T: Real>(
        shape: &Linear,
        library: cublasLtHandle_t,
        kept: Option<[u64; 8]>,
    ) -> Result<Self, LaunchError> {
        let refused = |source| LaunchError::Library { what: "the shape of a product", source };
        let mut plan = Self {
            operation: Operation::new().map_err(refused)?,
            w: Layout::new::<T>(shape.outputs, shape.inputs).map_err(refused)?,
            x: Layout::new::<T>(shape.rows, shape.inputs).map_err(refused)?,
            out: Layout::new::<T>(shape.rows, shape.outputs).map_err(refused)?,
            algorithm: cublasLtMatmulAlgo_t { data: kept.unwrap_or_default() },
        };
        if kept.is_none() || !plan.is_taken(library) {
            let first = plan.propose(library, 1)?.into_iter().next();
            let none = || LaunchError::Unsupported(format!("{shape:?} in cuBLASLt"));
            plan.algorithm = first.ok_or_else(none)?.algo;
        }
        Ok(plan)
    }

    fn is_taken(&self, library: cublasLtHandle_t) -> bool {
        let mut found = proposal();
        let (out, algorithm) = (self.out.0, &raw const self.algorithm);
        // SAFETY: everything is live; the result is written.
        let status = unsafe {
            cublasLtMatmulAlgoCheck(
                library,
                self.operation.0,
                self.w.0,
                self.x.0,
                out,
                out,
                algorithm,
                &raw mut found,
            )
        };
        status.result().is_ok() && found.workspaceSize <= WORKSPACE
    }

    /// What the library proposes, what it thinks best first.
    fn propose(
        &self,
        library: cublasLtHandle_t,
        most: usize,
    ) -> Result<Vec<cublasLtMatmulHeuristicResult_t>, LaunchError> {
        let refused = |source| LaunchError::Library { what: "to propose an algorithm", source };
        let preference = Preference::new().map_err(refused)?;
        let mut found = vec![proposal(); most];
        let mut count = 0;
        let wanted = i32::try_from(most).unwrap_or(i32::MAX);
        let (operation, out, to) = (self.operation.0, self.out.0, found.as_mut_ptr());
        // SAFETY: everything is live; at most as many results as there is room for are written.
        let status = unsafe {
            cublasLtMatmulAlgoGetHeuristic(
                library,
                operation,
                self.w.0,
                self.x.0,
                out,
                out,
                preference.0,
                wanted,
                to,
                &raw mut count,
            )
        };
        status.result().map_err(refused)?;
        found.truncate(usize::try_from(count).unwrap_or(0));
        found.retain(|it| {
            it.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS && it.workspaceSize <= WORKSPACE
        });
        Ok(found)
    }
}

/// Room for what the library says.
fn proposal() -> cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulHeuristicResult_t {
        algo: cublasLtMatmulAlgo_t { data: [0; 8] },
        workspaceSize: 0,
        state: cublasStatus_t::CUBLAS_STATUS_SUCCESS,
        wavesCount: 0.0,
        reserved: [0; 4],
    }
}

impl Kernels {
    /// Queues a product through cuBLASLt. Shapes as in [`Linear::reference`].
    ///
    /// # Errors
    /// When lengths do not fit, a row of x is no multiple of 8, or the library refuses.
    pub fn gemm<T: Real>(
        &self,
        shape: &Linear,
        (x, w): (&CudaSlice<T>, &CudaSlice<T>),
        out: &mut CudaSlice<T>,
        gemm: &mut Gemm,
    ) -> Result<(), LaunchError> {
        shape.check([x.len(), w.len(), out.len()])?;
        if shape.rows == 0 || shape.outputs == 0 {
            return Ok(());
        }
        let stream = self.stream();
        stream
            .context()
            .bind_to_thread()
            .map_err(|source| LaunchError::Driver { what: "to use the device", source })?;
        let (library, workspace) = (gemm.library.0, gemm.workspace.device_ptr_mut(stream).0);
        let plan = gemm.plan::<T>(shape)?;
        let added = match shape.onto {
            Onto::Nothing => 0.0_f32,
            Onto::Residual => 1.0,
        };
        let (x, w, out) =
            (x.device_ptr(stream).0, w.device_ptr(stream).0, out.device_ptr_mut(stream).0);
        // SAFETY: everything is live, and the memory is as long as the layouts say, which was checked above.
        let queued = unsafe {
            result::matmul(
                library,
                plan.operation.0,
                from_ref(&1.0_f32).cast(),
                from_ref(&added).cast(),
                w as *const c_void,
                plan.w.0,
                x as *const c_void,
                plan.x.0,
                out as *const c_void,
                plan.out.0,
                out as *mut c_void,
                plan.out.0,
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        };
        queued.map_err(|source| LaunchError::Library { what: "a product", source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(device: &str, version: usize) -> Choices {
        Choices { path: None, device: device.to_owned(), version, algorithms: HashMap::new() }
    }

    #[test]
    fn choices_are_read_back_on_the_same_device_and_version_alone() {
        let mut written = choices("NVIDIA H200", 130_100);
        written.algorithms.insert("bf16 64x4096x4096".to_owned(), [1, 2, 3, u64::MAX, 5, 6, 7, 8]);
        let text = written.text();
        assert_eq!(choices("NVIDIA H200", 130_100).parse(&text), Some(written.algorithms));
        assert_eq!(choices("NVIDIA H100", 130_100).parse(&text), None);
        assert_eq!(choices("NVIDIA H200", 130_200).parse(&text), None);
    }

    #[test]
    fn a_file_that_is_none_of_ours_is_ignored() {
        let kept = choices("a", 1);
        for text in [
            "",
            "[]",
            "{}",
            r#"{"device":"a","cublaslt":1}"#,
            r#"{"device":"a","cublaslt":1,"algorithms":{"b":[1]}}"#,
        ] {
            assert_eq!(kept.parse(text), None, "{text}");
        }
    }
}
