package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// MkdirMount makes the directory target and mounts a file system of type fstype
// on it. It is for the init of a test guest, which is the only process there.
func MkdirMount(fstype, target, options string) error {
	if err := unix.Mkdir(target, 0o755); err != nil && err != unix.EEXIST {
		return fmt.Errorf("mount %s on %s: %w", fstype, target, err)
	}
	if err := unix.Mount(fstype, target, fstype, 0, options); err != nil && err != unix.EBUSY {
		return fmt.Errorf("mount %s on %s: %w", fstype, target, err)
	}
	return nil
}

// LoadModule loads the kernel module in the open file fd (finit_module(2)).
// compressed says that the file is compressed and that the kernel is to unpack
// it itself (MODULE_INIT_COMPRESSED_FILE, Linux 5.17). A module that is loaded
// already is no error.
func LoadModule(fd int, compressed bool) error {
	flags := 0
	if compressed {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(fd, "", flags); err != nil && err != unix.EEXIST {
		return fmt.Errorf("finit_module: %w", err)
	}
	return nil
}

// PowerOff stops the machine at once, without telling any process. Only a guest's
// init may call it. It returns only when it fails.
func PowerOff() error {
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// InterfaceUp brings a network interface up (SIOCSIFFLAGS).
func InterfaceUp(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return fmt.Errorf("interface %s: read flags: %w", name, err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("interface %s: bring up: %w", name, err)
	}
	return nil
}

// RawTerminal turns off everything a terminal line does to the bytes that pass
// (cfmakeraw(3)), so that a serial port carries exactly what was written.
func RawTerminal(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	return nil
}

// DrainTerminal waits until all bytes written to a terminal have left it (tcdrain(3)).
func DrainTerminal(fd int) error {
	return unix.IoctlSetInt(fd, unix.TCSBRK, 1)
}

// ReapChild waits for any child of this process to end and collects it. It returns
// the child's pid and its exit code, or 128 plus the signal that killed it.
func ReapChild() (pid, code int, err error) {
	var ws unix.WaitStatus
	for {
		pid, err = unix.Wait4(-1, &ws, 0, nil)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return 0, 0, err
	}
	if ws.Signaled() {
		return pid, 128 + int(ws.Signal()), nil
	}
	return pid, ws.ExitStatus(), nil
}

// KillEveryone sends SIGKILL to every process but init and the caller
// (kill(2) with pid -1). It is for a test guest, between two tests.
func KillEveryone() error {
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && err != unix.ESRCH {
		return err
	}
	return nil
}
