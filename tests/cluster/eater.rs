//! Makes a process do what it never asked for: take memory as a leak would, or reach for what is not its own as a process
//! that was taken over would. By ptrace, on x86-64.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

const SYSCALL: i64 = 0x050f;
const READ_AND_WRITE: u64 = 3;
/// Private, anonymous, filled at once.
const FILLED: u64 = 0x8022;

/// A system call with up to six arguments; the rest are 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) number: i64,
    pub(crate) arguments: [u64; 6],
}

/// Maps `bytes` more into a process and fills them. It may be ended for it before that is done.
pub(crate) fn eat(pid: i32, bytes: u64) -> Result<()> {
    let arguments = [0, bytes, READ_AND_WRITE, FILLED, u64::MAX, 0];
    if let Some(result) = call(pid, "", |_| Call { number: nix::libc::SYS_mmap, arguments })? {
        ensure!(!(-4095..0).contains(&result), "mmap: {result}");
    }
    Ok(())
}

/// Runs one system call in a process and gives its result, or minus the error's number; `None` when the process ended for it.
/// `text` lies in the process's memory, ended by a zero, at the address that `of` is given.
pub(crate) fn call(pid: i32, text: &str, of: impl FnOnce(u64) -> Call) -> Result<Option<i64>> {
    let pid = Pid::from_raw(pid);
    ptrace::attach(pid).context("attach")?;
    let stopped = waitpid(pid, None)?;
    ensure!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    let address = put(pid, text).context("put the text into the process")?;
    let before = begin(pid, of(address)).context("begin the call")?;
    if matches!(waitpid(pid, None)?, WaitStatus::Signaled(..)) {
        return Ok(None);
    }
    match end(pid, before) {
        Ok(result) => Ok(Some(result)),
        Err(Errno::ESRCH) => Ok(None),
        Err(error) => Err(error).context("end the call"),
    }
}

/// Writes a text below what the stack holds.
fn put(pid: Pid, text: &str) -> nix::Result<u64> {
    /// Beyond the red zone, and near enough to be a part of the stack.
    const BELOW: u64 = 1024;
    let address = (ptrace::getregs(pid)?.rsp - BELOW) & !7;
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize((text.len() / 8 + 1) * 8, 0);
    for (place, word) in (address..).step_by(8).zip(bytes.chunks_exact(8)) {
        let word = word.iter().rev().fold(0_i64, |word, byte| word << 8 | i64::from(*byte));
        ptrace::write(pid, place as ptrace::AddressType, word)?;
    }
    Ok(address)
}

/// What the process would have done next.
struct Before {
    registers: user_regs_struct,
    word: i64,
}

/// Begins one system call in the place of whatever the process does.
fn begin(pid: Pid, wanted: Call) -> nix::Result<Before> {
    let registers = ptrace::getregs(pid)?;
    let code = registers.rip as ptrace::AddressType;
    let word = ptrace::read(pid, code)?;
    ptrace::write(pid, code, (word & !0xffff) | SYSCALL)?;
    let mut call = registers;
    // The call that was broken off begins again afterwards, not now.
    call.orig_rax = u64::MAX;
    call.rax = wanted.number.unsigned_abs();
    [call.rdi, call.rsi, call.rdx, call.r10, call.r8, call.r9] = wanted.arguments;
    ptrace::setregs(pid, call)?;
    ptrace::step(pid, None)?;
    Ok(Before { registers, word })
}

/// The call's result, once everything is put back.
fn end(pid: Pid, before: Before) -> nix::Result<i64> {
    let result = ptrace::getregs(pid)?.rax.cast_signed();
    ptrace::write(pid, before.registers.rip as ptrace::AddressType, before.word)?;
    ptrace::setregs(pid, before.registers)?;
    ptrace::detach(pid, None)?;
    Ok(result)
}
