//! Makes a process take memory that it never asked for, as a leak would. By ptrace, on x86-64.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

const SYSCALL: i64 = 0x050f;
const MMAP: u64 = 9;
const READ_AND_WRITE: u64 = 3;
/// Private, anonymous, filled at once.
const FILLED: u64 = 0x8022;

/// Maps `bytes` more into a process and fills them. It may be ended for it before that is done.
pub(crate) fn eat(pid: i32, bytes: u64) -> Result<()> {
    let pid = Pid::from_raw(pid);
    ptrace::attach(pid).context("attach")?;
    let stopped = waitpid(pid, None)?;
    ensure!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    let before = begin(pid, bytes).context("begin the call")?;
    if matches!(waitpid(pid, None)?, WaitStatus::Signaled(..)) {
        return Ok(());
    }
    match end(pid, before) {
        Ok(address) => {
            ensure!(address < u64::MAX - 4096, "mmap: {}", address.wrapping_neg());
            Ok(())
        }
        Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).context("end the call"),
    }
}

/// What the process would have done next.
struct Before {
    registers: user_regs_struct,
    word: i64,
}

/// Begins one system call in the place of whatever the process does.
fn begin(pid: Pid, bytes: u64) -> nix::Result<Before> {
    let registers = ptrace::getregs(pid)?;
    let code = registers.rip as ptrace::AddressType;
    let word = ptrace::read(pid, code)?;
    ptrace::write(pid, code, (word & !0xffff) | SYSCALL)?;
    let mut call = registers;
    // The call that was broken off begins again afterwards, not now.
    call.orig_rax = u64::MAX;
    (call.rax, call.rdi, call.rsi, call.rdx) = (MMAP, 0, bytes, READ_AND_WRITE);
    (call.r10, call.r8, call.r9) = (FILLED, u64::MAX, 0);
    ptrace::setregs(pid, call)?;
    ptrace::step(pid, None)?;
    Ok(Before { registers, word })
}

/// The call's result, once everything is put back.
fn end(pid: Pid, before: Before) -> nix::Result<u64> {
    let address = ptrace::getregs(pid)?.rax;
    ptrace::write(pid, before.registers.rip as ptrace::AddressType, before.word)?;
    ptrace::setregs(pid, before.registers)?;
    ptrace::detach(pid, None)?;
    Ok(address)
}
