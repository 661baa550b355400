package guest

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// nobody is the user without rights, on Debian and in guests.
const nobody = 65534

// Unprivileged lets a test that root cannot run, because root has no limits, run
// everywhere: guests and CI are root, and a skip there is a failure. It reports
// whether the caller is to go on. As root it is not: the test has then been run in
// a child of the user nobody, and t has its result. The child's working directory
// is "/".
func Unprivileged(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		return true
	}
	// The program's own path may lie where only root can look.
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.count=1", "-test.run="+exactly(t.Name()))
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "HOME=/tmp", "TMPDIR=/tmp")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()+" ") {
		t.Fatalf("as the user nobody: %v\n%s", err, out)
	}
	return false
}

// exactly is the -test.run pattern of one test or subtest.
func exactly(name string) string {
	parts := strings.Split(name, "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	return strings.Join(parts, "/")
}
