package sys

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// HardRlimitNofile returns the hard NOFILE limit of this process: what it can
// raise its own limit to without privileges.
func HardRlimitNofile() (uint64, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("NOFILE limit: %w", err)
	}
	return lim.Max, nil
}

// PatientScheduling makes all threads of this process, and what they start, yield the
// processor only when their time is up (SCHED_BATCH of sched(7)), and lets their timers be
// late by up to slack (timerslack_ns of proc(5)). For machines where it takes very long to
// go from one process to another: emulated ones.
func PatientScheduling(slack time.Duration) error {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}
		if err := unix.SchedSetAttr(tid, &attr, 0); err != nil && err != unix.ESRCH {
			return fmt.Errorf("SCHED_BATCH: %w", err)
		}
		err = os.WriteFile("/proc/"+t.Name()+"/timerslack_ns", strconv.AppendInt(nil, slack.Nanoseconds(), 10), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
