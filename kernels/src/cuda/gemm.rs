//! Products of many rows: cuBLASLt. Its meaning is that of [`super::Linear`].

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr::from_ref;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtGetVersion, cublasLtHandle_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulAlgoCheck, cublasLtMatmulAlgoGetHeuristic, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasLtReductionScheme_t,
    cublasStatus_t, cudaDataType, is_culib_present,
};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use super::{DeviceError, Kernels, LaunchError, Linear, Onto, Real};

/// Device memory that the library may use, as NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// How the library computes a product, in its own words.
pub(super) type Algorithm = [u64; 8];

/// The library with what it was told of shapes. Each is described once, so that a launch neither waits nor takes memory on the
/// device.
#[derive(Debug)]
pub(super) struct Gemm {
    library: Library,
    workspace: CudaSlice<u8>,
    plans: HashMap<(&'static str, Linear), Plan>,
}

// SAFETY: handles and descriptions of the library belong to no thread, and nothing here is shared between threads.
unsafe impl Send for Gemm {}

impl Gemm {
    /// Opens the library.
    ///
    /// # Errors
    /// When the library is not there or refuses, or the device has not as much memory.
    pub(super) fn open(kernels: &Kernels) -> Result<Self, DeviceError> {
        let context = kernels.stream().context();
        context
            .bind_to_thread()
            .map_err(|source| DeviceError::Driver { what: "use the device", source })?;
        let library = Library::open()?;
        Ok(Self { library, workspace: kernels.memory(WORKSPACE)?, plans: HashMap::new() })
    }

    pub(super) fn version(&self) -> usize {
        self.library.version()
    }

    /// What the library proposes for a shape, what it thinks best first.
    ///
    /// # Errors
    /// When the library refuses the shape.
    pub(super) fn propose<T: Real>(
        &mut self,
        shape: &Linear,
        most: usize,
    ) -> Result<Vec<Algorithm>, LaunchError> {
        let library = self.library.0;
        let found = self.plan::<T>(shape)?.propose(library, most)?;
        Ok(found.into_iter().map(|it| it.algo.data).collect())
    }

    /// Whether the library takes an algorithm that it proposed once.
    ///
    /// # Errors
    /// When the library refuses the shape.
    pub(super) fn takes<T: Real>(
        &mut self,
        shape: &Linear,
        algorithm: Algorithm,
    ) -> Result<bool, LaunchError> {
        let library = self.library.0;
        Ok(self.plan::<T>(shape)?.takes(library, algorithm))
    }

    /// The description of a shape, made when it is first asked for.
    fn plan<T: Real>(&mut self, shape: &Linear) -> Result<&mut Plan, LaunchError> {
        Ok(match self.plans.entry((T::NAME, *shape)) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => place.insert(Plan::new::<T>(shape)?),
        })
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

/// A shape as the library wants it.
#[derive(Debug)]
struct Plan {
    operation: Operation,
    w: Layout,
    x: Layout,
    out: Layout,
}

impl Plan {
    fn new<T: Real>(shape: &Linear) -> Result<Self, LaunchError> {
        let refused = |source| LaunchError::Library { what: "the shape of a product", source };
        Ok(Self {
            operation: Operation::new().map_err(refused)?,
            w: Layout::new::<T>(shape.outputs, shape.inputs).map_err(refused)?,
            x: Layout::new::<T>(shape.rows, shape.inputs).map_err(refused)?,
            out: Layout::new::<T>(shape.rows, shape.outputs).map_err(refused)?,
        })
    }

    fn takes(&self, library: cublasLtHandle_t, algorithm: Algorithm) -> bool {
        let mut found = proposal();
        let (out, algorithm) = (self.out.0, cublasLtMatmulAlgo_t { data: algorithm });
        // SAFETY: everything is live; the result is written.
        let status = unsafe {
            cublasLtMatmulAlgoCheck(
                library,
                self.operation.0,
                self.w.0,
                self.x.0,
                out,
                out,
                &raw const algorithm,
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
    /// Queues a product through cuBLASLt, by an algorithm that it proposed. Shapes as in [`Linear::reference`].
    ///
    /// # Errors
    /// When lengths do not fit, a row of x is no multiple of 8, or the library refuses.
    pub(super) fn gemm<T: Real>(
        &self,
        (shape, algorithm): (&Linear, Algorithm),
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
        let (plan, algorithm) = (gemm.plan::<T>(shape)?, cublasLtMatmulAlgo_t { data: algorithm });
        let added = if shape.onto == Onto::Residual { 1.0_f32 } else { 0.0 };
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
                &raw const algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        };
        queued.map_err(|source| LaunchError::Library { what: "a product", source })
    }
}
