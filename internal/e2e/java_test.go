package e2e

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// Java changes its keys by itself after as many bytes as its settings say (2^37 unless
// somebody lowers it, as here), and asks the service to change its own.
func TestHostJavaChangesKeys(t *testing.T) {
	java := program(t, "java", "openjdk-17-jdk-headless")
	limits := filepath.Join(tempDir(t), "java.security")
	if err := os.WriteFile(limits, []byte("jdk.tls.keyLimits=AES/GCM/NoPadding KeyUpdate 2^17\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	source, err := filepath.Abs("testdata/Client.java")
	if err != nil {
		t.Fatal(err)
	}
	u := start(t, visor.Options{})
	host, port, err := net.SplitHostPort(u.Addr)
	if err != nil {
		t.Fatal(err)
	}
	var all []*client
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"} {
		c := startClient(t, "java, "+suite, java, "-Djava.security.properties="+limits, "-Djavax.net.debug=ssl:handshake",
			"-XX:TieredStopAtLevel=1", source, host, port, suite)
		c.patience = 2 * time.Minute // the program is compiled first, on a machine that has other things to do
		all = append(all, c)
	}
	said := 0
	talk := func() {
		t.Helper()
		said++
		for _, c := range all {
			c.say("600000\n")
		}
		for _, c := range all {
			c.hear("back 600000", said)
		}
	}
	talk()
	u.settled(len(all))
	for _, step := range [][]string{{"upgrade"}, {"upgrade", "--supervisor"}, nil, {"upgrade"}} {
		if step == nil {
			u.killSupervisor()
		} else {
			u.run(0, step...)
		}
		talk()
	}
	for _, c := range all {
		_ = c.in.Close()
		c.ends()
		sent, followed := strings.Count(c.text(), "Produced KeyUpdate post-handshake"), strings.Count(c.text(), "read key updated")
		if sent < 10 || followed < 10 {
			t.Errorf("%s changed its keys %d times and followed us %d times", c.name, sent, followed)
		}
	}
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.Lost+c.Interrupted+c.ClosedUnknown+c.ClosedByOwner != 0 {
		t.Errorf("counters %+v, reasons %v", c, st.Reasons)
	}
}
