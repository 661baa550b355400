package vmtest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/spec"
)

// guestModules is where a guest keeps the modules it loads.
const guestModules = "/modules"

// machine is what every guest gets.
type machine struct {
	cpus   int
	model  string        // of the processors
	memory int           // MiB
	limit  time.Duration // of one boot
}

// writeInitramfs writes the initramfs of one kernel: what is shared, then its
// modules and the spec.
func writeInitramfs(file string, b *Build, k Kernel, without, env []string) (notes []string, err error) {
	mods, err := readModules(k.Modules)
	if err != nil {
		return nil, err
	}
	load, missing := mods.order(wantModules, without)
	if slices.Contains(missing, "tls") {
		notes = append(notes, "this guest gets no tls module")
	}
	s := spec.Spec{Tests: b.Tests, Env: env}
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	shared, err := os.Open(b.Archive)
	if err != nil {
		return nil, err
	}
	defer func() { _ = shared.Close() }()
	if _, err := io.Copy(f, shared); err != nil {
		return nil, err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	a := newArchive(w)
	for _, m := range load {
		to := path.Join(guestModules, filepath.Base(m))
		a.file(to, 0o644, filepath.Join(k.Modules, m))
		s.Modules = append(s.Modules, to)
	}
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	a.bytes(spec.Path, 0o644, data)
	if err := a.close(); err != nil {
		return nil, err
	}
	if err := w.Flush(); err != nil {
		return nil, err
	}
	return notes, f.Close()
}

// qemuArgs boots a kernel without any device but two serial ports: the first
// carries the kernel's console into a file, the second the results to our pipe.
func (m machine) qemuArgs(k Kernel, initramfs, console string) []string {
	return []string{
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", m.model,
		"-smp", strconv.Itoa(m.cpus), "-m", strconv.Itoa(m.memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
		"-no-reboot", "-nic", "none",
		"-kernel", k.Image, "-initrd", initramfs,
		// mitigations=off: emulation is slow enough, and nobody attacks this guest.
		// no_timer_check: on a busy host the emulated timer can miss the kernel's test
		// of it, which would then panic.
		// An oops ends the guest, so that a kernel bug is never a green run.
		"-append", "console=ttyS0 panic=-1 oops=panic quiet rdinit=/init mitigations=off no_timer_check random.trust_cpu=on cryptomgr.notests",
		"-serial", "file:" + console,
		"-serial", "stdio",
	}
}

// boot runs one guest and reads its results. on is called with each line of it. The
// text says how the guest ended when it was not by itself.
func (m machine) boot(run context.Context, k Kernel, initramfs, console string, on func(line string)) (*BootResult, string, error) {
	ctx, cancel := context.WithTimeout(run, m.limit)
	defer cancel()
	program, err := findTool(qemu)
	if err != nil {
		return nil, "", err
	}
	cmd := exec.CommandContext(ctx, program, m.qemuArgs(k, initramfs, console)...)
	// A guest must not outlive us. The signal comes when the thread that started it
	// ends, so that thread is kept until then.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, "", err
	}
	b := &BootResult{Kernel: k.Label}
	sc := bufio.NewScanner(out)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		b.Line(sc.Text())
		on(sc.Text())
	}
	readErr := sc.Err()
	if readErr != nil {
		cancel()
	}
	waitErr := cmd.Wait()
	b.Seconds = time.Since(start).Seconds()
	switch {
	case run.Err() != nil:
		return b, "interrupted", run.Err()
	case readErr != nil:
		return b, fmt.Sprintf("reading its results: %v", readErr), nil
	case ctx.Err() != nil:
		return b, fmt.Sprintf("stopped after the time limit of a boot, %s", m.limit), nil
	case waitErr != nil:
		return b, fmt.Sprintf("QEMU failed: %v: %s", waitErr, strings.TrimSpace(said.String())), nil
	}
	return b, "", nil
}
