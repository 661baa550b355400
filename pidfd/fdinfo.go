package pidfd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// ErrOtherNamespace reports a process that has no id where this one runs. It can be
// signalled and waited for all the same.
var ErrOtherNamespace = errors.New("the process is in another pid namespace and has no id in this one")

// readPid reads the process id behind a pidfd from /proc (proc_pid_fdinfo(5)): its
// "Pid:" line says -1 when the process has died and was waited for, and 0 when it is
// in a pid namespace that cannot be seen from here. Nothing but a pidfd has that line.
func readPid(fd int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, fmt.Errorf("process id of a pidfd (is /proc mounted?): %w", err)
	}
	for line := range bytes.Lines(b) {
		v, ok := bytes.CutPrefix(line, []byte("Pid:"))
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(string(bytes.TrimSpace(v)))
		switch {
		case err != nil:
			return 0, fmt.Errorf("process id of a pidfd: %w", err)
		case pid < 0:
			return 0, ErrDead
		case pid == 0:
			return 0, ErrOtherNamespace
		}
		return pid, nil
	}
	return 0, fmt.Errorf("descriptor %d is not a pidfd", fd)
}

// describe names the process behind a pidfd in error messages.
func describe(fd int) string {
	pid, err := readPid(fd)
	if err != nil {
		return "the process"
	}
	return "process " + strconv.Itoa(pid)
}
