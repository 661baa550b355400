package sys

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Inode returns the inode number of a descriptor.
func Inode(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("fstat: %w", err)
	}
	return st.Ino, nil
}

// KillChildWithSocket sends SIGKILL to the child of this process that has the socket
// with this inode open, and returns its pid: for a child of which nobody told the pid.
// It goes through a pidfd and looks again after opening that, so it reaches that
// process or nobody.
func KillChildWithSocket(inode uint64) (int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !holds(pid, inode) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		ok := parentOf(pid) == os.Getpid() && holds(pid, inode)
		if ok {
			err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		_ = unix.Close(fd)
		if !ok {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("kill process %d: %w", pid, err)
		}
		return pid, nil
	}
	return 0, errors.New("no child of this process has the socket open")
}

func holds(pid int, inode uint64) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	names, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	want := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	for _, n := range names {
		if to, err := os.Readlink(filepath.Join(dir, n.Name())); err == nil && to == want {
			return true
		}
	}
	return false
}

// parentOf reads the fourth field of /proc/PID/stat; the second may contain anything
// but ends with the last parenthesis (proc_pid_stat(5)).
func parentOf(pid int) int {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return -1
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 2 {
		return -1
	}
	n, err := strconv.Atoi(f[1])
	if err != nil {
		return -1
	}
	return n
}
